"""Execute saved Core AI programs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphopt.backends.interface import match_inputs
from graphopt.errors import VerificationError
from graphopt.extras import require

__all__ = ["run_asset"]


def run_asset(path: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Execute the saved asset at `path` on the Core AI runtime.

    Args:
        path: An .aimodel.
        inputs: By the names of the graph's inputs; they are converted to the types that the asset
            takes (64-bit integers to 32).

    Returns:
        Outputs in the program's order.

    Raises:
        VerificationError: The runtime refuses the asset or the inputs.
    """
    require("coreai.runtime", "coreai")
    from coreai.authoring import AIModelAsset
    from coreai.runtime import NDArray

    async def execute() -> list[Tensor]:
        async with AIModelAsset.load(path).executable() as model:
            function = model.load_function("main")
            feeds = {}
            for name, tensor in match_inputs(function.desc.input_names, inputs).items():
                dtype = np.dtype(function.desc.input_descriptor(name).dtype)
                array = as_type(name, tensor, dtype)
                feeds[name] = NDArray(np.ascontiguousarray(array))
            result = await function(feeds)
            # the mapping is not in the order of the outputs
            arrays = [np.array(result[name].numpy()) for name in function.desc.output_names]
            return [_tensor(array) for array in arrays]

    try:
        return _run_async(execute())
    except VerificationError:
        raise
    except Exception as error:
        raise VerificationError(
            f"{path.name} does not run on the Core AI runtime: {type(error).__name__}: {error}"
        ) from error


def as_type(name: str, tensor: Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    """An input in the type that an artifact takes.

    Raises:
        VerificationError: It holds integers that the type does not.
    """
    given = tensor.detach().cpu()
    array = (given.float() if given.dtype is torch.bfloat16 else given).numpy()
    changed = array.astype(dtype)
    if not tensor.is_floating_point() and not np.array_equal(changed, array):
        raise VerificationError(
            f"input {name!r} holds values that {dtype}, its type there, does not"
        )
    return changed


def _tensor(array: NDArray[Any]) -> Tensor:
    # numpy has no bfloat16 of its own
    known = array.dtype.kind in "biufc"
    return torch.from_numpy(array if known else array.astype(np.float32))


def _run_async(work: Coroutine[Any, Any, list[Tensor]]) -> list[Tensor]:
    """Run a coroutine also where an event loop runs already, as in a notebook."""
    with ThreadPoolExecutor(1, thread_name_prefix="graphopt-coreai") as pool:
        return pool.submit(asyncio.run, work).result()
