"""What is in a .pt2 file, before torch reads it: nothing that would run, and no more than fits.

torch.export.load evaluates expressions, unpickles, resolves names of functions, imports modules that
tree specs name, loads compiled libraries and writes names into Python code. Everything of that kind is
checked here against what torch.export.save itself writes.
"""

from __future__ import annotations

import contextlib
import io
import re
import zipfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from graphopt.audited import Limits, parse_json, read_tensors
from graphopt.capture.program_check import check_payloads, check_program
from graphopt.errors import CaptureError, ConfigError, InputError
from graphopt.ir.torch_private import ArchiveReader

__all__ = ["check_archive", "is_trusted", "trusting"]

_trusting: ContextVar[bool] = ContextVar("graphopt_trust", default=False)


@contextlib.contextmanager
def trusting(trust: bool = True) -> Iterator[None]:
    """Load .pt2 files inside as they are: they are one's own."""
    token = _trusting.set(trust or _trusting.get())
    try:
        yield
    finally:
        _trusting.reset(token)


def is_trusted() -> bool:
    """Whether files are loaded as they are."""
    return _trusting.get()


_MOST_MEMBERS = 1_000_000
_MOST_INFLATED = 2 << 30  # bytes of all members that are stored deflated
_MOST_TEXT = 1 << 30  # bytes of one JSON
_JSON = Limits(characters=_MOST_TEXT, depth=200, values=20_000_000)
_SMALL, _BLOCK = 1 << 16, 1 << 20
_NOTES = re.compile(
    r"archive_format|archive_version|byteorder|version|(?:\.data/)?(?:version|serialization_id)"
    r"|(?:\.format_version|\.storage_alignment)"
)
_PROGRAM = re.compile(r"models/[^/]+\.json|serialized_exported_program\.json")
_PAYLOADS = re.compile(r"data/(weights|constants)/[^/]+_(?:weights|constants)_config\.json")
_RAW = re.compile(r"data/(?:weights/weight|constants/tensor)_\d+")
_PICKLED = re.compile(
    r"data/(?:weights|constants|sample_inputs)/[^/]+\.pt"
    r"|serialized_(?:state_dict|constants|example_inputs)\.(?:pt|json)"
)
_EXTRA = re.compile(r"extra(?:_files)?/.+")
_OBJECT = re.compile(r"data/constants/(?:custom|opaque)_obj_\d+")


def check_archive(path: Path) -> None:
    """Refuse a .pt2 that holds more than tensors, a graph of known ops, and statements on sizes.

    Raises:
        CaptureError: It does; the message says what was found where, and how to load it all the same.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _Archive(path, archive).check()
    except (ConfigError, InputError) as error:
        raise _refusal(path, str(error)) from None
    except OSError as error:
        raise CaptureError(f"{path} cannot be read: {error}") from None
    except Exception as error:
        # damage shows as errors of many kinds, deep in what unpacks and parses
        raise CaptureError(
            f"{path} is not a program of torch.export.save, or damaged: {error or type(error).__name__}"
        ) from None


def _refusal(path: Path, found: str) -> CaptureError:
    return CaptureError(
        f"{path}: {found}. Loading it could run code; if the file is your own, load it with"
        " graphopt.capture(path, trust=True) or --trust"
    )


class _Archive:
    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path, self._archive = path, archive
        members = archive.infolist()
        if len(members) > _MOST_MEMBERS:
            raise InputError(f"{len(members):,} members")
        # torch takes the folder of the first member for the archive's own
        root, slash, _ = members[0].filename.partition("/") if members else ("", "", "")
        in_folder = bool(slash) and all(m.filename.startswith(root + "/") for m in members)
        self._root = root + "/" if in_folder else ""
        self._members = {member.filename.removeprefix(self._root): member for member in members}
        if len(self._members) != len(members):
            raise InputError("two members of one name")
        self._reader: Any = None

    def check(self) -> None:
        self._check_sizes()
        self._open_reader()
        pickled: set[str] = set()
        for name in self._members:
            if _PROGRAM.fullmatch(name):
                check_program(self._json(name), name)
            elif _PAYLOADS.fullmatch(name):
                pickled |= check_payloads(self._json(name), name, self._members)
            elif _OBJECT.fullmatch(name):
                raise InputError(f"{name} is a pickled object")
            elif _NOTES.fullmatch(name):
                self._small(name)
            elif not (_RAW.fullmatch(name) or _PICKLED.fullmatch(name) or _EXTRA.fullmatch(name)):
                raise InputError(f"{name!r} is nothing that torch.export.save writes")
        for name in self._members:
            if _PICKLED.fullmatch(name) or name in pickled:
                self._check_pickle(name)
            elif _RAW.fullmatch(name):
                self._check_sum(name)

    def _check_sizes(self) -> None:
        """No more bytes than there are on disk, but for texts that were deflated."""
        stored, inflated = 0, 0
        for name, member in self._members.items():
            if member.flag_bits & 1:
                raise InputError(f"{name} is encrypted")
            if member.compress_type == zipfile.ZIP_STORED:
                if member.file_size != member.compress_size:
                    raise InputError(f"{name} has two sizes")
                stored += member.file_size
            elif member.compress_type == zipfile.ZIP_DEFLATED:
                stored += member.compress_size
                inflated += member.file_size
            else:
                raise InputError(f"{name} is stored in an unusual way")
        if stored > self._path.stat().st_size:
            raise InputError("its members overlap one another, as those of a zip bomb do")
        if inflated > _MOST_INFLATED:
            raise InputError(
                f"unpacked its deflated members have {inflated:,} bytes, more than"
                f" {_MOST_INFLATED:,}, as a zip bomb has"
            )

    def _open_reader(self) -> None:
        """Torch's own reader of archives, which must find what Python's does.

        Where it reads nothing torch falls back on Python's.
        """
        with contextlib.suppress(RuntimeError):
            self._reader = ArchiveReader(str(self._path))
        if self._reader is not None and set(self._reader.get_all_records()) != set(self._members):
            raise InputError("its list of members can be read in two ways")

    def _read(self, name: str) -> bytes:
        with self._archive.open(self._members[name]) as file:
            content = file.read()
        if self._reader is not None and self._reader.get_record(name) != content:
            raise InputError(f"{name} can be read in two ways")
        return content

    def _small(self, name: str) -> None:
        if self._members[name].file_size > _SMALL:
            raise InputError(f"{name} has {self._members[name].file_size:,} bytes")

    def _json(self, name: str) -> Any:
        if self._members[name].file_size > _MOST_TEXT:
            raise InputError(f"{name} has {self._members[name].file_size:,} bytes")
        return parse_json(self._read(name), name, _JSON)

    def _check_sum(self, name: str) -> None:
        """Weights are as they were written: Python's reader compares checksums, torch's does not."""
        with self._archive.open(self._members[name]) as file:
            while file.read(_BLOCK):
                pass

    def _check_pickle(self, name: str) -> None:
        content = self._read(name)
        if not content:
            return
        file = io.BytesIO(content)
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as inner:
                if sum(member.file_size for member in inner.infolist()) > len(content) + _SMALL:
                    raise InputError(f"{name} unpacks to more than it has, as a zip bomb does")
        try:
            read_tensors(io.BytesIO(content))
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
