"""Functions that numba compiles, and loads from its cache without the machinery of its compiler.

Before it looks into its cache, numba imports the typing and the lowering of all of numpy that it knows, which
takes longer than most of what the kernels here are for. Code that is compiled already needs none of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache
from numba.core.runtime import rtsys

__all__ = ["compiled"]

_log = logging.getLogger(__name__)


class _QuickCache(FunctionCache):  # type: ignore[misc]
    """A cache that looks first and prepares the compiler only where nothing is found."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            rtsys.initialize(target_context)  # arrays that the code makes are of its memory
            with self._guard_against_spurious_io_errors():
                found = self._load_overload(sig, target_context)
        except Exception as error:  # another numba, or a file of one
            _log.debug("compiled code is loaded by numba's own way: %r", error)
            found = None
        return super().load_overload(sig, target_context) if found is None else found


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator for kernels: they are cached, release the GIL and divide as numpy does.

    >>> @compiled()
    ... def twice(x):
    ...     return 2 * x
    >>> twice(3)
    6

    Args:
        options: More of `numba.njit`'s, such as `fastmath`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        kernel = njit(cache=True, nogil=True, error_model="numpy", **options)(function)
        if type(getattr(kernel, "_cache", None)) is FunctionCache:
            kernel._cache.__class__ = _QuickCache
        return kernel

    return decorate
