"""Which torch device heavy arithmetic runs on, for whatever is called inside."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from graphopt.errors import InputError

__all__ = ["chosen_device", "computing_on", "device_of", "for_doubles", "lacks"]

_chosen: ContextVar[torch.device | None] = ContextVar("device", default=None)


def device_of(given: torch.device | str | None) -> torch.device | None:
    """The device that `device=` names.

    Raises:
        InputError: There is none of that name here.
    """
    if given is None:
        return None
    try:
        device = torch.device(given)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else "unknown"
        raise InputError(f"device={given!r} cannot be used here: {first}") from None
    return device


def chosen_device() -> torch.device | None:
    """The device of the innermost `computing_on`; None stands for the compiled code of the CPU."""
    return _chosen.get()


@contextmanager
def computing_on(device: torch.device | str | None) -> Iterator[None]:
    """Let arithmetic of this thread run on a device, "cpu" by torch too; None leaves it as it was."""
    if device is None:
        yield
        return
    token = _chosen.set(torch.device(device))
    try:
        yield
    finally:
        _chosen.reset(token)


@functools.cache
def for_doubles(device: torch.device) -> torch.device:
    """Where float64 is computed: there, or on the CPU for a device without, such as Apple's GPUs."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return torch.device("cpu")
    return device


def lacks(device: torch.device, error: Exception) -> bool:
    """Whether an error says that a device has no kernel, or no type, for what it was asked."""
    return isinstance(error, NotImplementedError) or (
        isinstance(error, TypeError) and device.type in str(error).lower()
    )
