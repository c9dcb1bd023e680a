"""Memory that the C library holds back after arrays are freed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

__all__ = ["give_back"]


@functools.cache
def _trim() -> Callable[[int], Any] | None:
    """The call of glibc; other C libraries give memory back by themselves, or have none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def give_back() -> None:
    """Give freed memory back to the system.

    glibc keeps freed arrays of up to 32 MB, and aligned ones leave holes that the next of their size
    do not fit: a gigabyte after a hundred layers. Meant for after each large weight; takes about a
    millisecond.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
