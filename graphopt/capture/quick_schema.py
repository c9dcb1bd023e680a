"""Classes of torch's schema for .pt2 files are read and made with what is known of them looked up once.

A program of some hundred ops is tens of thousands of their instances. Torch asks for the annotations and the
fields of a class again for each of them.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from graphopt.exclusive import patched
from graphopt.ir import torch_private

__all__ = ["SchemaReader", "quick_unions"]

_Read = Callable[[Any], Any]


@contextmanager
def quick_unions() -> Iterator[None]:
    """Let unions of the schema be made without a look at the fields of their class.

    It patches torch for all threads, so it belongs inside `exclusive`.
    """
    serializing: Any = torch_private.serializing
    union = serializing._Union
    before = union.__dict__["create"]
    empty: dict[Any, dict[str, None]] = {}
    tags: dict[Any, Any] = {}

    def create(cls: Any, /, **chosen: Any) -> Any:
        [(name, value)] = chosen.items() if len(chosen) == 1 else [("", None)]
        if (cls, name) not in tags:
            made = before.__func__(cls, **chosen)
            empty[cls] = {field.name: None for field in dataclasses.fields(cls)}
            tags[cls, name] = made._type
            return made
        made = object.__new__(cls)
        made.__dict__.update(empty[cls])
        made.__dict__.update({name: value, "_type": tags[cls, name]})
        return made

    with patched(union, create=classmethod(create)):
        yield


class SchemaReader:
    """What JSON stands for, by the annotations of torch's schema; what does not fit them, torch refuses."""

    def __init__(self) -> None:
        self._serializing: Any = torch_private.serializing
        self._union = self._serializing._Union
        self._by_torch: Callable[[Any, Any], Any] = self._serializing._dict_to_dataclass
        self._known: dict[Any, _Read] = {}

    def __call__(self, kind: Any, data: Any) -> Any:
        """An instance of a class, or of another annotation, from what a file says of it."""
        return self._reader(kind)(data)

    def _reader(self, kind: Any) -> _Read:
        kind = self._serializing._resolve_schema_cls(kind)
        key = kind if isinstance(kind, type) else repr(kind)
        if key not in self._known:
            # classes hold themselves: what a reader needs, it looks up when it reads
            self._known[key] = self._made(kind)
        return self._known[key]

    def _made(self, kind: Any) -> _Read:
        origin, parts = typing.get_origin(kind), typing.get_args(kind)
        if origin is Annotated:
            return self._reader(parts[0])
        if origin in (typing.Union, types.UnionType) and type(None) in parts and len(parts) == 2:
            return self._optional(parts[0])
        if isinstance(kind, type) and issubclass(kind, self._union):
            return self._one_of(kind)
        if dataclasses.is_dataclass(kind):
            return self._fields(kind)
        if origin is list:
            return self._list(kind, parts[0])
        if origin is dict:
            return self._dict(kind, parts[1])
        return self._plain(kind)

    def _hints(self, kind: Any) -> dict[str, Any]:
        return typing.get_type_hints(kind, globalns=vars(self._serializing.schema))

    def _optional(self, kind: Any) -> _Read:
        reader = self._reader(kind)
        return lambda data: None if data is None else reader(data)

    def _one_of(self, kind: Any) -> _Read:
        hints = self._hints(kind)
        readers: dict[str, _Read] = {}

        def read(data: Any) -> Any:
            if not isinstance(data, dict) or len(data) != 1:
                return self._by_torch(kind, data)
            [(name, value)] = data.items()
            if name not in readers:
                if name not in hints:
                    return self._by_torch(kind, data)
                readers[name] = self._reader(hints[name])
            return kind.create(**{name: readers[name](value)})

        return read

    def _fields(self, kind: Any) -> _Read:
        hints = self._hints(kind)
        names = [field.name for field in dataclasses.fields(kind)]
        readers: dict[str, _Read] = {}

        def read(data: Any) -> Any:
            if not readers:
                readers.update((name, self._reader(hints[name])) for name in names)
            # files of later versions may have more
            return kind(**{name: readers[name](data[name]) for name in names if name in data})

        return read

    def _list(self, kind: Any, item: Any) -> _Read:
        reader = self._reader(item)
        return lambda data: (
            [reader(each) for each in data]
            if isinstance(data, list)
            else self._by_torch(kind, data)
        )

    def _dict(self, kind: Any, item: Any) -> _Read:
        reader = self._reader(item)
        return lambda data: (
            {name: reader(each) for name, each in data.items()}
            if isinstance(data, dict)
            else self._by_torch(kind, data)
        )

    def _plain(self, kind: Any) -> _Read:
        def read(data: Any) -> Any:
            if kind is float or isinstance(data, list | dict):
                return self._by_torch(kind, data)
            return data

        return read
