"""Archives of `torch.export.save`, with their texts deflated."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import override

from graphopt.audited import Limits, parse_json
from graphopt.ir.mapped import release

__all__ = ["Sink", "deflate_texts"]

_ALIGNED = 64  # bytes; torch maps tensors from files at such places
_HEADER = 30  # bytes of a member's header, before its name
_ROOT = "model"
_ID = "/.data/serialization_id"
_BLOCK = 1 << 20
_RELEASED = 1 << 28  # bytes
_TEXTS = (".json", ".py", ".txt")
_LIMITS = Limits(characters=1 << 30, depth=50, values=100_000_000)  # a line for each tensor
_WEIGHTS, _CONFIG = "/data/weights/", "_weights_config.json"


class Sink(io.RawIOBase):
    """A file that keeps its first error for `check`: torch's writer ends the process where one fails."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._error: OSError | None = None
        self._written = 0

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
        self._written += size
        if self._written >= _RELEASED:
            # tensors that lie in files were read to be written
            release()
            self._written = 0
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

    What several programs of an archive share is kept once.

    `torch.export.load` reads both. The graph's JSON is several times the size of small weights. The
    result says nothing of when, where and under which name it was written: equal contents have equal
    bytes.

    Args:
        archive: What `torch.export.save` wrote.
        result: Where to write to.
    """
    digest = hashlib.sha256()
    with zipfile.ZipFile(archive) as given, zipfile.ZipFile(result, "w") as written:
        twins = _twins(given)
        members = [each for each in given.infolist() if each.filename not in twins]
        for member in sorted(members, key=lambda member: member.filename.endswith(_ID)):
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
            if member.filename.endswith(_CONFIG) and twins:
                content = _with_first(given.read(member), twins)
                digest.update(content)
                info.file_size = len(content)
                written.writestr(info, content)
                continue
            digest.update(f"{info.filename}\0{member.file_size}\0".encode())
            with given.open(member) as source, written.open(info, "w") as target:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    target.write(block)


def _twins(given: zipfile.ZipFile) -> dict[str, str]:
    """Tensors that a member of an earlier program holds already: name → that member's.

    Two tensors of one program never become one: what is loaded for both would be the same memory,
    and caches that are written begin as equal zeros.
    """
    members = {each.filename: each for each in given.infolist() if _WEIGHTS in each.filename}
    configs = [name for name in members if name.endswith(_CONFIG)]
    if len(configs) < 2:
        return {}
    known: dict[tuple[int, bytes], list[str]] = {}
    twins: dict[str, str] = {}
    for config in configs:
        table = parse_json(given.read(config), "the table of tensors", _LIMITS)["config"]
        folder = config.rpartition("/")[0]
        names = dict.fromkeys(f"{folder}/{entry['path_name']}" for entry in table.values())
        own: dict[tuple[int, bytes], list[str]] = {}
        for name in (name for name in names if name in members):
            key = members[name].file_size, _digest(given, name)
            earlier = known.get(key, [])
            place = len(own.setdefault(key, []))
            own[key].append(earlier[place] if place < len(earlier) else name)
            if own[key][-1] != name:
                twins[name] = own[key][-1]
        for key, kept in own.items():
            known.setdefault(key, []).extend(kept[len(known.get(key, [])) :])
    return twins


def _digest(given: zipfile.ZipFile, name: str) -> bytes:
    digest = hashlib.sha256()
    with given.open(name) as source:
        while block := source.read(_BLOCK):
            digest.update(block)
    return digest.digest()


def _with_first(config: bytes, twins: dict[str, str]) -> bytes:
    """A table of a program's tensors that names the members which are kept."""
    names = {name.rpartition("/")[2]: first.rpartition("/")[2] for name, first in twins.items()}
    table = parse_json(config, "the table of tensors", _LIMITS)
    for entry in table["config"].values():
        entry["path_name"] = names.get(entry["path_name"], entry["path_name"])
    return json.dumps(table).encode()


def _padding(written: zipfile.ZipFile, name: str) -> bytes:
    """An extra field behind which the member's bytes are aligned."""
    assert written.fp is not None
    start = written.fp.tell() + _HEADER + len(name.encode()) + 4
    return b"FB" + (gap := -start % _ALIGNED).to_bytes(2, "little") + b"Z" * gap
