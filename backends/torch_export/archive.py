"""Archives of `torch.export.save`, with their texts deflated."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import override

__all__ = ["Sink", "deflate_texts"]

_ALIGNED = 64  # bytes; torch maps tensors from files at such places
_HEADER = 30  # bytes of a member's header, before its name
_ROOT = "model"
_ID = "/.data/serialization_id"
_BLOCK = 1 << 20
_TEXTS = (".json", ".py", ".txt")


class Sink(io.RawIOBase):
    """A file that keeps its first error for `check`: torch's writer ends the process where one fails."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._error: OSError | None = None

    @override
    def writable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.tell()  # torch goes back to the start once all is written

    @override
    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return size

    def check(self) -> None:
        """Raise the error of a write that has failed.

        Raises:
            OSError: One has.
        """
        if self._error is not None:
            raise self._error
        self._file.flush()


def deflate_texts(archive: Path, result: Path) -> None:
    """Write an archive again with its JSON deflated; tensors stay as they are, and aligned.

    `torch.export.load` reads both. The graph's JSON is several times the size of small weights. The
    result says nothing of when, where and under which name it was written: equal contents have equal
    bytes.

    Args:
        archive: What `torch.export.save` wrote.
        result: Where to write to.
    """
    digest = hashlib.sha256()
    with zipfile.ZipFile(archive) as given, zipfile.ZipFile(result, "w") as written:
        for member in sorted(given.infolist(), key=lambda member: member.filename.endswith(_ID)):
            info = zipfile.ZipInfo(f"{_ROOT}/{member.filename.partition('/')[2]}")
            info.external_attr = member.external_attr
            if member.filename.endswith(_TEXTS):
                info.compress_type = zipfile.ZIP_DEFLATED
            else:
                info.extra = _padding(written, info.filename)
            if member.filename.endswith(_ID):
                # as many digits as torch's own, which are of addresses
                content = f"{int(digest.hexdigest(), 16) % 10**40:040}".encode()
                written.writestr(info, content)
                continue
            info.file_size = member.file_size
            digest.update(f"{info.filename}\0{member.file_size}\0".encode())
            with given.open(member) as source, written.open(info, "w") as target:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    target.write(block)


def _padding(written: zipfile.ZipFile, name: str) -> bytes:
    """An extra field behind which the member's bytes are aligned."""
    assert written.fp is not None
    start = written.fp.tell() + _HEADER + len(name.encode()) + 4
    return b"FB" + (gap := -start % _ALIGNED).to_bytes(2, "little") + b"Z" * gap
