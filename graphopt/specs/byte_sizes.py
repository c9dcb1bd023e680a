"""Sizes as people write them: "12MB", "400 KiB", 5e6."""

from __future__ import annotations

import math
import re

from graphopt.errors import InputError

__all__ = ["parse_bytes"]

_TEXT = re.compile(r"\s*(\d+(?:[_,]\d{3})*(?:\.\d+)?(?:[eE]\+?\d+)?)\s*([a-zA-Z]*)\s*")
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}


def parse_bytes(size: str | float) -> int:
    """A number of bytes; KB, MB and GB are decimal, KiB, MiB and GiB binary.

    >>> parse_bytes("1.5 MB"), parse_bytes("1 KiB"), parse_bytes(2000)
    (1500000, 1024, 2000)

    Args:
        size: A number of bytes, or a number with a unit.

    Raises:
        InputError: It is no positive size.
    """
    if isinstance(size, str):
        match = _TEXT.fullmatch(size)
        if match is None or match[2].lower() not in _UNITS:
            raise InputError(f"{size!r} is no size; write a number and B, KB, KiB, MB, MiB or GB")
        number = float(re.sub("[_,]", "", match[1])) * _UNITS[match[2].lower()]
    else:
        number = float(size)
    if not math.isfinite(number) or number < 1:
        raise InputError(f"a size is at least one byte, got {size!r}")
    return int(number)
