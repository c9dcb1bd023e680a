"""Writing files and folders so that a failure leaves what was there before."""

from __future__ import annotations

import csv
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["delete_path", "replaced", "write_csv"]


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A path to write a file or folder to, renamed to `target` if all goes well.

    Folders above it are made. What stood at `target` stays there after an error, and nothing else.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # beside its place, on the same file system
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    try:
        yield temporary
        _rename(temporary, target)
    finally:
        delete_path(temporary)


def write_csv(target: Path, rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> Path:
    """Write rows under a heading, whole or not at all."""
    with (
        replaced(target) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    return target


def _rename(temporary: Path, target: Path) -> None:
    """Rename a file or folder to `target`, in place of what is there."""
    if target.is_dir():
        # a folder cannot be renamed over another one: set the old one aside first
        aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
        os.replace(target, aside)
        try:
            os.replace(temporary, target)
        except OSError:
            os.replace(aside, target)
            raise
        delete_path(aside)
    else:
        os.replace(temporary, target)


def delete_path(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
