"""Two paths that take each other's place in one step, where the system can do that."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

__all__ = ["exchange"]

_HERE = -100  # AT_FDCWD: paths are relative to the working folder
_SWAP = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS


def exchange(one: Path, other: Path) -> bool:
    """Let two existing paths of one file system change places; False where that cannot be done."""
    first, second = os.fsencode(one), os.fsencode(other)
    try:
        system = ctypes.CDLL(None)
        if sys.platform == "linux":
            return system.renameat2(_HERE, first, _HERE, second, _SWAP) == 0
        if sys.platform == "darwin":
            return system.renamex_np(first, second, _SWAP) == 0
    except (OSError, AttributeError, TypeError):
        return False
    return False
