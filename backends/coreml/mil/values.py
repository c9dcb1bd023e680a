"""Values of MIL ops' inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Array", "Rule", "Values", "given_ints", "tensor"]

# input values by name: arrays, scalars, strings; absent optional inputs are left out
Values = dict[str, Any]
Array = NDArray[Any]
Rule = Callable[[Values], Array | tuple[Array, ...]]


def tensor(value: Any) -> torch.Tensor:
    """A value as a tensor; float16 is computed in float32 and rounded by whoever stores the result."""
    array = np.asarray(value)
    return torch.from_numpy(
        np.array(array, np.float32 if array.dtype == np.float16 else array.dtype)
    )


def given_ints(v: Values, key: str, default: int, n: int) -> list[int]:
    """A list of integers, `n` times the default where it is not given."""
    return [int(i) for i in np.atleast_1d(v[key])] if v.get(key) is not None else [default] * n
