"""Writing files and folders so that a failure leaves what was there before."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["delete_path", "replace_path", "temporary_sibling"]


@contextmanager
def temporary_sibling(target: Path) -> Iterator[Path]:
    """A path beside `target`, on the same file system; whatever is there afterwards is deleted."""
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    try:
        yield temporary
    finally:
        delete_path(temporary)


def replace_path(temporary: Path, target: Path) -> None:
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
