"""Hashes of what callables and data are, not of what they are called, for keys of resumable files."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

__all__ = ["content_hash", "tensors_hash"]

_DEEPEST = 12


def content_hash(value: object) -> str:
    """A hash that changes with what `value` computes or holds.

    Of functions it covers code, constants, defaults, closures and the functions and plain values of
    their modules that they name; of objects their class and attributes; of tensors the bytes. What
    lies deeper than 12 levels, or in compiled code, counts by its name alone.
    """
    return _Hash().of(value, 0)


def tensors_hash(graph: fx.GraphModule) -> str:
    """A hash of all tensors that a graph reads, whatever they are called."""
    digests = []
    for path in dict.fromkeys(
        str(n.target) for n in graph.graph.find_nodes(op="get_attr") if n.users
    ):
        tensor = _attribute(graph, path)
        if isinstance(tensor, Tensor):
            digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\0".encode())
            digest.update(_bytes(tensor))
            digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _attribute(module: object, path: str) -> object:
    for part in path.split("."):
        module = getattr(module, part, None)
    return module


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


class _Hash:
    """One walk; what it has met is named by when it met it, so that circles end."""

    def __init__(self) -> None:
        self._met: dict[int, int] = {}
        self._kept: list[object] = []  # an identity is one's own only as long as one lives

    def of(self, value: object, depth: int) -> str:
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | range):
            return f"{type(value).__name__} {value!r}"
        if depth > _DEEPEST:
            return f"deep {_name(type(value))}"
        if id(value) in self._met:
            return f"met {self._met[id(value)]}"
        self._met[id(value)] = len(self._met)
        self._kept.append(value)
        parts: list[Any] = self._parts(value, depth + 1)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.encode() if isinstance(part, str) else part)
            digest.update(b"\0")
        return digest.hexdigest()

    def _parts(self, value: Any, depth: int) -> list[Any]:
        kind = _name(type(value))
        match value:
            case Tensor():
                return [kind, str(value.dtype), str(tuple(value.shape)), _bytes(value)]
            case np.ndarray() if value.dtype != object:
                return [
                    kind,
                    str(value.dtype),
                    str(value.shape),
                    np.ascontiguousarray(value).tobytes(),
                ]
            case Mapping():
                pairs = [(self.of(key, depth), self.of(item, depth)) for key, item in value.items()]
                return [kind, *(part for pair in pairs for part in pair)]
            case list() | tuple():
                return [kind, *(self.of(item, depth) for item in value)]
            case Set():
                return [kind, *sorted(_Hash().of(item, depth) for item in value)]
            case types.FunctionType():
                return [kind, *self._function(value, depth)]
            case types.MethodType():
                return [kind, self.of(value.__func__, depth), self.of(value.__self__, depth)]
            case functools.partial():
                inner = (value.func, value.args, value.keywords)
                return [kind, *(self.of(part, depth) for part in inner)]
            case types.CodeType():
                return [kind, *self._code(value, depth)]
            case type():
                return ["class", _name(value), *self._class(value, depth)]
            case types.ModuleType():
                return ["module", value.__name__]
        return [kind, *self._object(value, depth)]

    def _code(self, code: types.CodeType, depth: int) -> list[Any]:
        constants = [self.of(constant, depth) for constant in code.co_consts]
        return [code.co_code, " ".join((*code.co_names, *code.co_varnames)), *constants]

    def _function(self, function: Any, depth: int) -> list[Any]:
        parts = self._code(function.__code__, depth)
        parts += [self.of(function.__defaults__, depth), self.of(function.__kwdefaults__, depth)]
        for cell in function.__closure__ or ():
            try:
                parts.append(self.of(cell.cell_contents, depth))
            except ValueError:
                parts.append("empty")
        return parts + self._named(function, depth)

    def _named(self, function: Any, depth: int) -> list[Any]:
        """What a function takes from its module by name."""
        parts = []
        names = set(function.__code__.co_names)
        for constant in function.__code__.co_consts:
            names |= set(constant.co_names) if isinstance(constant, types.CodeType) else set()
        for name in sorted(names & set(function.__globals__)):
            value = function.__globals__[name]
            library = _module(value).split(".")[0] in _LIBRARIES
            parts.append(f"{name}={_name(value) if library else self.of(value, depth)}")
        return parts

    def _class(self, kind: type, depth: int) -> list[Any]:
        if kind.__module__.split(".")[0] in _LIBRARIES:
            return []
        own = {name: value for name, value in vars(kind).items() if not name.startswith("__")}
        own |= {name: vars(kind)[name] for name in ("__call__", "__init__") if name in vars(kind)}
        return [self.of(_plain(value), depth) for _, value in sorted(own.items())]

    def _object(self, value: Any, depth: int) -> list[Any]:
        if isinstance(value, nn.Module):
            state = [value.training, dict(value.named_parameters()), dict(value.named_buffers())]
            return [*self._class(type(value), depth), *(self.of(part, depth) for part in state)]
        held = getattr(value, "__dict__", None)
        if held is None:
            return []
        return [*self._class(type(value), depth), self.of(dict(held), depth)]


_LIBRARIES = {
    *("torch", "numpy", "builtins", "math", "scipy", "torchvision", "transformers", "sklearn"),
    *("collections", "functools", "itertools", "typing", "pathlib", "graphopt", "logging"),
}


def _plain(value: Any) -> Any:
    """The function behind a property, a class method or a static method."""
    if isinstance(value, property):
        return value.fget
    return getattr(value, "__func__", value)


def _module(value: Any) -> str:
    named = value.__name__ if isinstance(value, types.ModuleType) else None
    return str(named or getattr(value, "__module__", None) or "")


def _name(value: Any) -> str:
    return f"{_module(value)}.{getattr(value, '__qualname__', type(value).__qualname__)}"
