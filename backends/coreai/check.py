"""Execute saved Core AI programs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphopt.backends.interface import match_inputs
from graphopt.errors import VerificationError
from graphopt.exclusive import silent
from graphopt.extras import require

__all__ = ["Running", "alone", "run_asset", "run_calls"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
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

    async def execute() -> list[Step]:
        async with AIModelAsset.load(path).executable() as model:
            names = functions or ["main"] * len(calls)
            loaded = {name: model.load_function(name) for name in dict.fromkeys(names)}
            kept: dict[str, Any] = {}
            steps = []
            for each in loaded.values():
                for name in set(each.desc.state_names) & set(state or {}) - set(kept):
                    described = each.desc.state_descriptor(name)
                    kept[name] = _array(name, (state or {})[name], described)
            for name, inputs in zip(names, calls, strict=True):
                function, desc = loaded[name], loaded[name].desc
                feeds = _feeds(desc, inputs)
                own = {name: kept[name] for name in state or {} if name in desc.state_names}
                result = await function(feeds, state=own)
                # the mapping is not in the order of the outputs
                outputs = [_tensor(result[name]) for name in desc.output_names]
                steps.append((outputs, [_tensor(array) for array in own.values()]))
            return steps

    try:
        with silent():  # the runtime tells of each function that it loads
            return alone(asyncio.run, execute())
    except VerificationError:
        raise
    except Exception as error:
        raise VerificationError(
            f"{path.name} does not run on the Core AI runtime: {type(error).__name__}: {error}"
        ) from error


class Running:
    """A loaded asset whose "main" computes the same call again and again.

    Args:
        path: An .aimodel.
        inputs: Of the call, by the names of the graph's inputs.
        state: Name of a state → its value before the first call; it goes on from call to call.

    Attributes:
        feeds: The inputs as the asset takes them, by its own names.

    Raises:
        VerificationError: The runtime refuses the asset or the inputs.
    """

    def __init__(
        self, path: Path, inputs: dict[str, Tensor], state: Mapping[str, Tensor] | None = None
    ) -> None:
        require("coreai.runtime", "coreai")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="graphopt-coreai")
        self._loop = asyncio.new_event_loop()
        self._opened = AsyncExitStack()
        try:
            with silent():
                self._on_loop(self._load(path, inputs, state or {}))
        except Exception as error:
            self.close()
            if isinstance(error, VerificationError):
                raise
            raise VerificationError(
                f"{path.name} does not run on the Core AI runtime: {type(error).__name__}: {error}"
            ) from error

    def __call__(self) -> object:
        """Compute the call."""
        return self._on_loop(self._once())

    def close(self) -> None:
        """Let go of the asset."""
        self._on_loop(self._opened.aclose())
        self._pool.submit(self._loop.close).result()
        self._pool.shutdown()

    async def _load(
        self, path: Path, inputs: dict[str, Tensor], state: Mapping[str, Tensor]
    ) -> None:
        from coreai.authoring import AIModelAsset

        model = await self._opened.enter_async_context(AIModelAsset.load(path).executable())
        self._function = model.load_function("main")
        desc = self._function.desc
        self.feeds = _feeds(desc, inputs)
        self._state = {
            name: _array(name, state[name], desc.state_descriptor(name))
            for name in desc.state_names
        }

    async def _once(self) -> object:
        return await self._function(self.feeds, state=self._state)

    def _on_loop(self, work: Coroutine[Any, Any, _R]) -> _R:
        return self._pool.submit(self._loop.run_until_complete, work).result()


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


def _feeds(desc: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Inputs as a function takes them, by its own names."""
    return {
        name: _array(name, tensor, desc.input_descriptor(name))
        for name, tensor in match_inputs(desc.input_names, inputs).items()
    }


def _array(name: str, tensor: Tensor, descriptor: Any) -> Any:
    from coreai.runtime import NDArray

    value = as_type(name, tensor, np.dtype(descriptor.dtype))
    return NDArray(np.ascontiguousarray(value).copy())


def _tensor(given: Any) -> Tensor:
    array = np.array(given.numpy())
    # numpy has no bfloat16 of its own
    known = array.dtype.kind in "biufc"
    return torch.from_numpy(array if known else array.astype(np.float32))


def alone(function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Call a function in a thread of its own, where no event loop runs as it does in a notebook."""
    with ThreadPoolExecutor(1, thread_name_prefix="graphopt-coreai") as pool:
        return pool.submit(function, *args, **kwargs).result()
