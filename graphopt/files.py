"""Writing files and folders so that a failure, a kill or a full disk leaves what was there before.

What is written lies beside its place under a temporary name that says which process writes it, and
takes the place in one step. The next writer removes what processes that were killed have left.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graphopt.errors import GraphOptError, InputError, OutputError

if sys.platform != "win32":
    import fcntl

__all__ = [
    "alone_in",
    "beside",
    "delete_path",
    "inside",
    "locked",
    "remove_leftovers",
    "replaced",
    "reserved",
    "scratch",
    "stored_size",
    "work_path",
    "write_csv",
]

# bytes of what a temporary name takes over from the place's; writers put prefixes before it
_LONGEST, _LONGEST_SUFFIX = 120, 32
_WORK = ".work"  # end of what writers need beside what they write
_HERE = -100  # AT_FDCWD: paths are relative to the working folder
_SWAP = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
_MINE = re.compile(r"\.(.*)\.([0-9a-f]{6})-(\d+)-[0-9a-f]{8}(\..*)?")
_active: set[str] = set()  # temporary names of this process
_guard = threading.Lock()


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A path to write a file or folder to, which takes the place of `target` if all goes well.

    Folders above it are made. What stood at `target` stays there after an error, and nothing else; a
    link is followed. The path ends as `target` does.

    Raises:
        OutputError: It cannot be written, or a file would take the place of a folder or the reverse.
    """
    with _as_output_error(target):
        place = Path(os.path.realpath(target))
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(place)
    temporary = place.with_name(_temporary_name(place))
    with _guard:
        _active.add(temporary.name)
    try:
        # errors of the body that are not of the system pass as they are
        with _as_output_error(target):
            yield temporary
            _take_place(temporary, place)
    finally:
        with contextlib.suppress(OSError):
            delete_path(temporary)
        with _guard:
            _active.discard(temporary.name)


def work_path(temporary: Path) -> Path:
    """A path beside the one that `replaced` gave, for what is deleted before that takes its place."""
    return temporary.with_name(temporary.name + _WORK)


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A folder beside `target`, which is deleted at the end, or by the next writer of `target`.

    Raises:
        OutputError: It cannot be made.
    """
    place = Path(os.path.realpath(target))
    temporary = _temporary_name(place)
    with _guard:
        _active.add(temporary)
    folder = work_path(place.with_name(temporary))
    try:
        with _as_output_error(target):
            folder.mkdir(parents=True)
            remove_leftovers(place)
        yield folder
    finally:
        with contextlib.suppress(OSError):
            delete_path(folder)
        with _guard:
            _active.discard(temporary)


@contextmanager
def _as_output_error(target: Path) -> Iterator[None]:
    try:
        yield
    except GraphOptError:
        raise
    except OSError as error:
        why = error.strerror or str(error)
        raise OutputError(
            error.errno, f"{target} cannot be written: {why}; what was there is as it was"
        ) from error


def _temporary_name(place: Path) -> str:
    """A name beside `place` that ends as it does, with who writes it."""
    owner = f"{_HOST}-{os.getpid()}-{secrets.token_hex(4)}"
    return f".{_stem(place)}.{owner}{_suffix(place)}"


def _suffix(place: Path) -> str:
    return place.suffix if len(os.fsencode(place.suffix)) <= _LONGEST_SUFFIX else ""


def _stem(place: Path) -> str:
    """The name without its end, shortened where a longer one would find no place."""
    stem = os.fsencode(place.name.removesuffix(_suffix(place)))
    if len(stem) <= _LONGEST:
        return os.fsdecode(stem)
    return (
        stem[: _LONGEST - 13].decode(errors="ignore") + "-" + hashlib.sha256(stem).hexdigest()[:12]
    )


def remove_leftovers(place: Path, suffix: str | None = None) -> None:
    """Delete what killed writers of the same place have left; put back what one had set aside.

    Args:
        place: Where they would have written to.
        suffix: What their temporary names end in, where that is not the place's own end.
    """
    stem, suffix = _stem(place), _suffix(place) if suffix is None else suffix
    with os.scandir(place.parent) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(f".{stem}.")]
    for name in sorted(names):
        match = _MINE.fullmatch(name)
        if match is None or match[1] not in (stem, f"{stem}.old"):
            continue
        if (match[4] or "") not in (suffix, suffix + _WORK):
            continue
        if match[2] != _HOST or _is_alive(int(match[3]), name):
            continue
        with contextlib.suppress(OSError):
            if match[1] != stem and not os.path.lexists(place):
                os.replace(place.with_name(name), place)
            delete_path(place.with_name(name))


def _is_alive(process: int, name: str) -> bool:
    if process == os.getpid():
        with _guard:
            return name.removesuffix(_WORK) in _active
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _take_place(temporary: Path, place: Path) -> None:
    """Put a file or folder in the place of what is there, in one step."""
    if os.path.lexists(place) and place.is_dir() != temporary.is_dir():
        kinds = ("a folder", "a file") if place.is_dir() else ("a file", "a folder")
        raise OutputError(
            errno.EEXIST,
            f"{place} is {kinds[0]}, and {kinds[1]} is to be written; delete it or choose another"
            " path",
        )
    with alone_in(place.parent):
        if not place.is_dir():
            os.replace(temporary, place)
            return
        if _exchanged(temporary, place):
            return  # the old one is now the temporary, which is deleted
        # no folder can be renamed over another one, so for a moment there is none
        aside = temporary.with_name(temporary.name.replace(f".{_HOST}-", f".old.{_HOST}-", 1))
        os.replace(place, aside)
        try:
            os.replace(temporary, place)
        except OSError:
            os.replace(aside, place)
            raise
        with contextlib.suppress(OSError):
            delete_path(aside)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Renames of one folder one after the other, where the system has such locks."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def beside(target: Path, word: str) -> Path:
    """A hidden path beside `target` with its name, shortened where it must be, and a word."""
    return target.with_name(f".{_stem(target)}{_suffix(target)}.{word}")


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep `target` to this run; the lock ends with the process, however that ends.

    Raises:
        OutputError: Another run has it; the message says which.
    """
    with _as_output_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    path = beside(target, "lock")
    handle = _acquired(path, target)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(handle)


def _acquired(path: Path, target: Path) -> int | None:
    if sys.platform == "win32":
        return None
    while True:
        with _as_output_error(target):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another run"
            os.close(handle)
            raise OutputError(
                errno.EAGAIN,
                f"{target} is being written by {owner}; wait for it, or choose another",
            ) from None
        except OSError:
            # a file system without locks
            os.close(handle)
            return None
        with contextlib.suppress(OSError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                os.truncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
                return handle
        os.close(handle)  # its owner has just deleted it


def reserved(path: Path, size: int) -> None:
    """Make sure that `size` bytes can be written to a new file at `path`, for writers that abort.

    Raises:
        OutputError: They cannot: the disk is full, or files may not be so large.
    """
    with _as_output_error(path):
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise OSError(errno.ENOSPC, f"{size:,} bytes are needed, {free:,} are free")
        with path.open("wb") as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, max(size, 1))
            finally:
                path.unlink()


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


def inside(folder: Path, *parts: str) -> Path:
    """A path in a folder that a file of others names.

    Raises:
        InputError: It lies elsewhere.
    """
    path = folder.joinpath(*parts)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise InputError(f"{'/'.join(map(str, parts))!r} is no path inside of its folder")
    return path


def delete_path(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def stored_size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _exchanged(one: Path, other: Path) -> bool:
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
