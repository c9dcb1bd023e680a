"""ArtifactSpec: the file that a compression is for, and sizes of files as people write them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import field_validator

from graphopt.errors import ConfigError
from graphopt.specs.model import SpecModel

__all__ = ["ArtifactSpec", "read_bytes"]

_SIZE = re.compile(r"\s*(\d[\d_,]*(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*")
_UNITS = {"": 1, "b": 1, "bytes": 1} | {
    unit: base**power
    for power, letter in enumerate("kmgt", start=1)
    for unit, base in ((f"{letter}b", 1000), (f"{letter}ib", 1024))
}
_PLAIN = (str, int, float, bool, type(None))


class ArtifactSpec(SpecModel):
    """For which file a program is compressed; lowering and saving hold to it.

    Attributes:
        backend: Name of the target.
        lowering: Options of its `lower`: texts, numbers, and lists and mappings of such.
        max_bytes: Bytes that its file may have; None for any number.
    """

    backend: str
    lowering: Mapping[str, Any] = {}
    max_bytes: int | None = None

    @field_validator("lowering")
    @classmethod
    def _can_be_written(cls, value: Mapping[str, Any]) -> dict[str, Any]:
        strange = sorted(name for name, given in value.items() if not _is_plain(given))
        if strange:
            raise ValueError(
                f"{', '.join(map(repr, strange))} cannot be kept in a file; give them to"
                " `graphopt.lower` when the artifact is made"
            )
        return dict(value)

    @field_validator("max_bytes")
    @classmethod
    def _is_positive(cls, value: int | None) -> int | None:
        if value is not None and value <= 0:
            raise ValueError("must be positive")
        return value


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def read_bytes(size: float | str) -> int:
    """A number of bytes: KB, MB and GB are powers of 1000, KiB, MiB and GiB of 1024.

    >>> read_bytes("1.5MiB")
    1572864

    Args:
        size: Bytes, or a text with a unit, in any case; fractions of bytes are cut off.

    Raises:
        ConfigError: It is no size.
    """
    number: float
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is None or match[2].lower() not in _UNITS:
            raise ConfigError(
                f"{size!r} is no size; write bytes, or a number with KB, MB, GB (powers of 1000) or"
                " KiB, MiB, GiB (of 1024)"
            )
        number = float(match[1].replace(",", "").replace("_", "")) * _UNITS[match[2].lower()]
    else:
        number = float(size)
    if not math.isfinite(number) or number < 0:
        raise ConfigError(f"{size!r} is no size: bytes are zero or more")
    return int(number)
