"""Whether all values are numbers, in one pass that makes no mask."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["all_finite"]


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    Args:
        tensor: Any shape, type and device.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return bool(torch.isfinite(tensor).all())
    if tensor.dtype.itemsize == 1:  # of 8 bits there is no order to ask for
        tensor = tensor.float()
    low, high = tensor.detach().aminmax()  # both are NaN where one value is
    return bool(low.isfinite() and high.isfinite())
