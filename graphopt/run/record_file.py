"""Files that a long run appends to and goes on from: a head, then records, each sealed by a checksum.

One JSON value a line, so that other programs can read them. The checksum of a record covers the head,
so that no record is taken for one of another run, and one bit that has changed anywhere is found.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from graphopt.audited import Limits, parse_json
from graphopt.errors import ConfigError, InputError
from graphopt.files import replaced

__all__ = ["RecordFile", "sealed", "unsealed"]

_log = logging.getLogger(__name__)
_SEALED = re.compile(rb'\{"check": "([0-9a-f]{32})", (.*)')
_LIMITS = Limits(characters=1 << 30, depth=64, values=50_000_000)
_Record = dict[str, Any]
_Taken = TypeVar("_Taken")


def sealed(value: Mapping[str, Any], salt: str = "") -> bytes:
    """A line of JSON that begins with its checksum.

    Args:
        value: Plain values, at least one.
        salt: What else must be as it was for the line to count.
    """
    rest = json.dumps(dict(value)).encode()[1:]
    return b'{"check": "' + _check(rest, salt).encode() + b'", ' + rest


def unsealed(line: bytes, salt: str = "") -> _Record | None:
    """The values of a line of `sealed`, or None where it is not as it was written."""
    match = _SEALED.fullmatch(line)
    if match is None or _check(match[2], salt) != match[1].decode():
        return None
    try:
        value = parse_json(b"{" + match[2], "record", _LIMITS)
    except ConfigError:
        return None
    return value if isinstance(value, dict) else None


def _check(rest: bytes, salt: str) -> str:
    return hashlib.sha256(salt.encode() + b"\0" + rest).hexdigest()[:32]


@dataclass(frozen=True)
class _Content:
    """What a file holds.

    Attributes:
        head: The head, None where it is damaged or there is none.
        salt: What seals the records.
        records: Those that are as they were written.
        damaged: Lines that are not.
        end: Length of the whole lines.
        size: Length of the file.
    """

    head: _Record | None
    salt: str
    records: tuple[_Record, ...]
    damaged: int
    end: int
    size: int


@dataclass(frozen=True)
class RecordFile:
    """A file of records.

    Attributes:
        path: Where it is.
        head: What it is about: `format`, `version`, and all that decides what is in the records.
    """

    path: Path
    head: _Record

    def __post_init__(self) -> None:
        # as it comes back: tuples as lists
        plain = parse_json(json.dumps(self.head), "head", _LIMITS)
        object.__setattr__(self, "head", plain)

    @property
    def salt(self) -> str:
        """What seals the records."""
        return _salt(self.head)

    @classmethod
    def read(
        cls,
        path: Path,
        kind: str,
        version: int,
        take: Callable[[_Record, Sequence[_Record]], _Taken],
    ) -> _Taken:
        """Take in a file, whatever it is about; records that are damaged are left out and said.

        Args:
            path: The file.
            kind: Its `format`.
            version: The one that is read.
            take: Head, records → what they mean.

        Raises:
            InputError: It is none of this kind, of another version, damaged, or holds something else.
        """
        content = _read(path, None)
        if content.head is None:
            raise InputError(f"{path}: not a {_words(kind)}, or its first line is damaged")
        _check_kind(content.head, path, kind, version)
        if content.damaged:
            _log.warning("%s: %d damaged records are left out", path, content.damaged)
        try:
            return take(content.head, content.records)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a {_words(kind)}: {error}") from None

    def begin(self) -> None:
        """Write the head alone."""
        with replaced(self.path) as temporary:
            temporary.write_bytes(sealed(self.head) + b"\n")

    def resume(self, difference: Callable[[_Record], str]) -> list[_Record]:
        """Go on with the file, if it is there and about the same; or begin it.

        What was cut off goes; damaged records are left out, which is said, and the file is written
        anew without them.

        Args:
            difference: Another head → what of it differs, in the user's words.

        Returns:
            The records.

        Raises:
            InputError: It is about something else, and holds records.
        """
        kind, version = self.head["format"], self.head["version"]
        if not self.path.exists() or not self.path.stat().st_size:
            self.begin()
            return []
        content = _read(self.path, self.head)
        if content.head is not None and content.head != self.head:
            _check_kind(content.head, self.path, kind, version)
            if content.records:
                raise InputError(
                    f"{self.path} was made with other settings: {difference(content.head)}; write to"
                    " another file, or begin anew (resume=False, --restart)"
                )
            self.begin()
            return []
        if content.head is None and not content.records:
            # of a file that got no further than its first line nothing is lost
            first = self.path.read_bytes()
            if not (sealed(self.head) + b"\n").startswith(first):
                raise InputError(
                    f"{self.path}: not a {_words(kind)}, or damaged as a whole; write to another file"
                )
            self.begin()
            return []
        if content.damaged or content.head is None:
            _log.warning("%s is damaged: %d records are computed again", self.path, content.damaged)
            with replaced(self.path) as temporary, temporary.open("wb") as file:
                file.write(sealed(self.head) + b"\n")
                file.writelines(sealed(record, self.salt) + b"\n" for record in content.records)
        elif content.end < content.size:
            os.truncate(self.path, content.end)
        return list(content.records)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record."""
        with self.path.open("ab") as file:
            file.write(sealed(record, self.salt) + b"\n")


def _words(kind: str) -> str:
    return kind.removeprefix("graphopt ")


def _salt(head: Mapping[str, Any]) -> str:
    return _check(json.dumps(dict(head)).encode(), "head")


def _read(path: Path, expected: _Record | None) -> _Content:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    end = content.rfind(b"\n") + 1
    first, *rest = content[:end].split(b"\n")[:-1] or [b""]
    head = unsealed(first)
    if head is None:
        head = _unsealed_head(first)
    salt = _salt(head if head is not None else expected or {})
    records = [unsealed(line, salt) for line in rest]
    good = tuple(record for record in records if record is not None)
    return _Content(head, salt, good, len(records) - len(good), end, len(content))


def _unsealed_head(line: bytes) -> _Record | None:
    """The head of a file of an earlier version, which had no checksums."""
    try:
        head = parse_json(line, "head", _LIMITS)
    except ConfigError:
        return None
    old = isinstance(head, dict) and "format" in head and "check" not in head
    return head if old and head.get("version", 1) == 1 else None


def _check_kind(head: Mapping[str, Any], path: Path, kind: str, version: int) -> None:
    if head.get("format") != kind:
        raise InputError(f"{path}: not a {_words(kind)}")
    if head.get("version") != version:
        raise InputError(
            f"{path}: version {head.get('version', 1)}; this release reads {version}; measure anew"
        )
