"""Execute saved Core AI programs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.backends.base import match_inputs
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
                array = tensor.detach().cpu().numpy().astype(dtype)
                feeds[name] = NDArray(np.ascontiguousarray(array))
            result = await function(feeds)
            # the mapping is not in the order of the outputs
            arrays = [np.array(result[name].numpy()) for name in function.desc.output_names]
            return [torch.from_numpy(array) for array in arrays]

    try:
        return _run_async(execute())
    except Exception as error:
        raise VerificationError(
            f"{path.name} does not run on the Core AI runtime: {type(error).__name__}: {error}"
        ) from error


def _run_async(work: Coroutine[Any, Any, list[Tensor]]) -> list[Tensor]:
    """Run a coroutine also where an event loop runs already, as in a notebook."""
    with ThreadPoolExecutor(1, thread_name_prefix="graphopt-coreai") as pool:
        return pool.submit(asyncio.run, work).result()
