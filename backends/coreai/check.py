"""Execute saved Core AI programs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphopt.backends.interface import match_inputs
from graphopt.errors import VerificationError
from graphopt.exclusive import silent
from graphopt.extras import require

__all__ = ["run_asset", "run_calls"]


Step = tuple[list[Tensor], list[Tensor]]


def run_asset(path: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs of one call of a saved asset without state; see `run_calls`."""
    return run_calls(path, [inputs])[0][0]


def run_calls(
    path: Path,
    calls: Sequence[dict[str, Tensor]],
    state: Mapping[str, Tensor] | None = None,
    functions: Sequence[str] | None = None,
) -> list[Step]:
    """Execute the saved asset at `path` on the Core AI runtime.

    Args:
        path: An .aimodel.
        calls: Inputs of each call by the names of the graph's inputs; they are converted to the
            types that the asset takes (64-bit integers to 32).
        state: Name of a state → its value before the first call.
        functions: Name of the function that each call is of; "main" by default.

    Returns:
        For each call its outputs in the program's order, and the state behind it in the given order.

    Raises:
        VerificationError: The runtime refuses the asset or the inputs.
    """
    require("coreai.runtime", "coreai")
    from coreai.authoring import AIModelAsset
    from coreai.runtime import NDArray

    async def execute() -> list[Step]:
        async with AIModelAsset.load(path).executable() as model:
            names = functions or ["main"] * len(calls)
            loaded = {name: model.load_function(name) for name in dict.fromkeys(names)}
            kept: dict[str, Any] = {}
            steps = []
            for each in loaded.values():
                for name in set(each.desc.state_names) & set(state or {}) - set(kept):
                    described = each.desc.state_descriptor(name)
                    kept[name] = _array(NDArray, name, (state or {})[name], described)
            for name, inputs in zip(names, calls, strict=True):
                function, desc = loaded[name], loaded[name].desc
                feeds = {
                    name: _array(NDArray, name, tensor, desc.input_descriptor(name))
                    for name, tensor in match_inputs(desc.input_names, inputs).items()
                }
                own = {name: kept[name] for name in state or {} if name in desc.state_names}
                result = await function(feeds, state=own)
                # the mapping is not in the order of the outputs
                outputs = [_tensor(result[name]) for name in desc.output_names]
                steps.append((outputs, [_tensor(array) for array in own.values()]))
            return steps

    try:
        with silent():  # the runtime tells of each function that it loads
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


def _array(kind: Any, name: str, tensor: Tensor, descriptor: Any) -> Any:
    value = as_type(name, tensor, np.dtype(descriptor.dtype))
    return kind(np.ascontiguousarray(value).copy())


def _tensor(given: Any) -> Tensor:
    array = np.array(given.numpy())
    # numpy has no bfloat16 of its own
    known = array.dtype.kind in "biufc"
    return torch.from_numpy(array if known else array.astype(np.float32))


def _run_async(work: Coroutine[Any, Any, list[Step]]) -> list[Step]:
    """Run a coroutine also where an event loop runs already, as in a notebook."""
    with ThreadPoolExecutor(1, thread_name_prefix="graphopt-coreai") as pool:
        return pool.submit(asyncio.run, work).result()
