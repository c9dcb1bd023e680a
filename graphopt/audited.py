"""The one place where text and bytes of others become values, patterns, modules or code.

Nothing else in the library unpickles, evaluates, imports by a name that it was given, reads YAML or
compiles a pattern that it was given; `tests/test_audited.py` holds the rest of the tree to that. What
is read here is limited in size, depth and time, and no text of a file names what runs.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import pickle
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import IO, Any, NoReturn

import numpy as np
import torch
import yaml

from graphopt.errors import ConfigError, InputError
from graphopt.unpacked import check_tensors, check_unpacked

__all__ = [
    "Limits",
    "Pattern",
    "attribute_of",
    "compiled_condition",
    "evaluated",
    "imports_allowed",
    "module_of",
    "own_module",
    "parse_json",
    "parse_yaml",
    "pattern",
    "read_arrays",
    "read_exported",
    "read_pickle_of_ours",
    "read_tensors",
]


_LONGEST_NUMBER = 1_000  # characters
_DIGITS = re.compile(r"[-+.:\w]*")


@dataclass(frozen=True)
class Limits:
    """How much a text may hold.

    Attributes:
        characters: Of the text.
        depth: Of mappings and lists within one another.
        values: Mappings, lists and scalars, those of an alias counted each time it is used.
    """

    characters: int = 4 << 20
    depth: int = 64
    values: int = 200_000


def parse_json(text: str | bytes, owner: str, limits: Limits | None = None) -> Any:
    """Plain values of JSON.

    Args:
        text: What was read.
        owner: What messages begin with.
        limits: The defaults of `Limits` when None.

    Raises:
        ConfigError: It is no JSON, or larger or deeper than the limits.
    """
    limits = limits or Limits()
    _check_length(text, owner, limits)
    _check_separators(text, owner, limits)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{owner}: not valid JSON: {_brief(error)}") from None
    _check_values(value, owner, limits)
    return value


def parse_yaml(text: str | bytes, owner: str, limits: Limits | None = None) -> Any:
    """Plain values of YAML.

    Args:
        text: What was read.
        owner: What messages begin with.
        limits: The defaults of `Limits` when None.

    Raises:
        ConfigError: It is no YAML, or larger or deeper than the limits.
    """
    limits = limits or Limits()
    _check_length(text, owner, limits)
    try:
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader), owner, limits)
        return yaml.safe_load(text)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, RecursionError) as error:
        # numbers of thousands of digits, days that there are not, keys that are mappings
        raise ConfigError(f"{owner}: not valid YAML: {_brief(error)}") from None


def _brief(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _check_length(text: str | bytes, owner: str, limits: Limits) -> None:
    if len(text) > limits.characters:
        raise ConfigError(
            f"{owner}: {len(text):,} characters; at most {limits.characters:,} are read"
        )


def _check_separators(text: str | bytes, owner: str, limits: Limits) -> None:
    """Refuse what would take too much memory before it is parsed: each value has a comma or bracket."""
    count = 0
    for mark in "[{,":
        count += text.count(mark) if isinstance(text, str) else text.count(mark.encode())
    # texts within may hold some, too
    if count > 4 * limits.values:
        _too_many(owner, limits)


def _too_deep(owner: str, limits: Limits) -> NoReturn:
    raise ConfigError(f"{owner}: nested more than {limits.depth} levels deep")


def _too_many(owner: str, limits: Limits) -> NoReturn:
    raise ConfigError(f"{owner}: more than {limits.values:,} values")


def _check_values(value: Any, owner: str, limits: Limits) -> None:
    """Depth and number of values of what a parser of JSON gave, which holds nothing twice."""
    count, level = 0, [value]
    for _ in range(limits.depth + 1):
        count += len(level)
        if count > limits.values:
            _too_many(owner, limits)
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    _too_deep(owner, limits)


def _check_events(events: Iterator[yaml.Event], owner: str, limits: Limits) -> None:
    """Depth and number of values of a YAML text with its aliases written out."""
    anchors: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []  # anchor, values before it
    total = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            # of an anchor that is still open: a mapping that holds itself
            total += anchors.get(str(event.anchor), limits.values + 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, total))
            total += 1
            if len(open_) > limits.depth:
                _too_deep(owner, limits)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                anchors[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            _check_number(event, owner)
            if event.anchor is not None:
                anchors[event.anchor] = 1
        if total > limits.values:
            _too_many(owner, limits)


def _check_number(event: yaml.ScalarEvent, owner: str) -> None:
    """Numbers to the base of 60, "1:59:59", take the square of their length."""
    if len(event.value) <= _LONGEST_NUMBER:
        return
    tagged = event.tag is not None and event.tag.endswith((":int", ":float"))
    if (event.implicit[0] or tagged) and _DIGITS.fullmatch(event.value):
        raise ConfigError(f"{owner}: not valid YAML: a number of {len(event.value):,} characters")


_LONGEST_PATTERN = 2_000
_SECONDS = 1.0
_SOON = 0.05  # s; what takes less is not counted towards ten times the limit for all names
# without these a pattern is the name itself
_SPECIAL = re.compile(r"[\\.^$*+?{}\[\]|()]")
_REPEATS = re.compile(r"[*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]|\\\d|\(\?P=")
_FEW = 3  # repeats outside of groups: at most cubic in the length of a name


class Pattern:
    """A regular expression that was given, matched in bounded time.

    Attributes:
        text: The expression.
    """

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or len(text) > _LONGEST_PATTERN:
            raise ConfigError(
                f"a regular expression is a text of at most {_LONGEST_PATTERN:,} characters,"
                f" got {str(text)[:60]!r}…"
            )
        try:
            compiled = re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{text!r} is not a valid regular expression: {error}") from None
        self.text = text
        self._spent = 0.0
        self._timed = _may_take_long(text)
        self._compiled: Any = compiled if not self._timed else _with_time_limit(text)

    def fullmatch(self, name: str) -> bool:
        """Whether the whole of `name` fits.

        Raises:
            ConfigError: That takes longer than a second.
        """
        return self._found(self._compiled.fullmatch, name)

    def search(self, text: str) -> bool:
        """Whether some of `text` fits.

        Raises:
            ConfigError: That takes longer than a second.
        """
        return self._found(self._compiled.search, text)

    def _found(self, how: Callable[..., Any], text: str) -> bool:
        if not self._timed:
            return how(text) is not None
        started = time.perf_counter()
        try:
            matches = how(text, timeout=_SECONDS) is not None
        except TimeoutError:
            raise self._too_slow(text) from None
        took = time.perf_counter() - started
        self._spent += took if took > _SOON else 0.0
        if self._spent > _SECONDS * 10:
            raise self._too_slow(text)
        return matches

    def _too_slow(self, text: str) -> ConfigError:
        return ConfigError(
            f"the regular expression {self.text!r} takes longer than {_SECONDS:g} s to compare with"
            f" {text[:60]!r}; write it without repeats inside repeats"
        )


def _may_take_long(text: str) -> bool:
    if not _SPECIAL.search(text):
        return False
    return len(_REPEATS.findall(text)) > _FEW or _REPEATED_GROUP.search(text) is not None


def _with_time_limit(text: str) -> Any:
    # an engine with a time limit, which only what may need one waits for
    engine = importlib.import_module("regex")
    try:
        return engine.compile(text)
    except engine.error as error:
        raise ConfigError(f"{text!r} is not a valid regular expression: {error}") from None


@functools.lru_cache(maxsize=4096)
def pattern(text: str) -> Pattern:
    """A regular expression of a config, a recipe or a call.

    Raises:
        ConfigError: It is none, or longer than 2,000 characters.
    """
    return Pattern(text)


_imports: ContextVar[bool] = ContextVar("graphopt_allow_imports", default=False)


@contextmanager
def imports_allowed(allow: bool = True) -> Iterator[None]:
    """Let names in configs import the modules that they name, which runs those modules."""
    token = _imports.set(allow)
    try:
        yield
    finally:
        _imports.reset(token)


def attribute_of(dotted: str) -> object:
    """What "package.module.Name" stands for in a module that is imported already, or None.

    A module is imported only inside `imports_allowed`.
    """
    module, _, name = dotted.rpartition(".")
    if not module or not all(part.isidentifier() for part in dotted.split(".")):
        return None
    loaded = sys.modules.get(module)
    if loaded is None and _imports.get():
        try:
            loaded = importlib.import_module(module)
        except ImportError:
            return None
    # no getattr: modules that load lazily import what they are asked for
    return None if loaded is None else vars(loaded).get(name)


def own_module(name: str) -> ModuleType:
    """A module of this library by a name that one of its tables holds."""
    if name.split(".")[0] != "graphopt":
        raise ValueError(f"{name} is no module of graphopt")
    return importlib.import_module(name)


def module_of(name: str) -> ModuleType:
    """A package that the library's code or an installed target names: an extra, or one imported late."""
    return importlib.import_module(name)


def compiled_condition(code: str) -> CodeType:
    """A condition over sizes, whose grammar the caller has checked, ready for `evaluated`."""
    return compile(code, "<condition>", "eval")


def evaluated(code: CodeType, names: Mapping[str, Any]) -> Any:
    """The value of a condition over `names` alone; it has no builtins."""
    return eval(code, {"__builtins__": {}, **names})


def read_tensors(source: str | Path | IO[bytes]) -> Any:
    """Tensors and plain containers of a file of `torch.save`; other classes are not read.

    Raises:
        InputError: It is none, holds something else, or unpacks to far more than it has.
    """
    name = source if isinstance(source, str | Path) else "the file"
    try:
        check_unpacked(source)
        content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        why = " ".join(str(error).strip().splitlines()[:1])
        raise InputError(f"{name} cannot be read as tensors and plain containers: {why}") from None
    check_tensors(content, str(name))
    return content


def read_arrays(path: Path) -> Any:
    """An array of a .npy file, or a mapping of those of a .npz; objects are not read.

    Raises:
        InputError: It is none, damaged, or unpacks to far more than it has.
    """
    try:
        check_unpacked(path)
        content = np.load(path, allow_pickle=False)
        arrays = (
            {} if isinstance(content, np.ndarray) else {name: content[name] for name in content}
        )
    except Exception as error:
        # damage shows as errors of many kinds, deep in what unpacks
        raise InputError(f"{path} cannot be read: {error}") from None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise InputError(f"{path}: {name!r} is no array")
    return content if isinstance(content, np.ndarray) else arrays


def read_exported(source: str | Path | IO[bytes]) -> torch.export.ExportedProgram:
    """A program that the caller has checked, has written itself, or was told to trust."""
    return torch.export.load(source)


def read_pickle_of_ours(payload: bytes, elsewhere: Callable[[Any], Any] | None = None) -> Any:
    """What this process's parent pickled for its worker; never a file's bytes.

    Args:
        payload: The pickle.
        elsewhere: Name → what the parent has left out and kept under it.
    """
    reader: Any = pickle.Unpickler(io.BytesIO(payload))
    if elsewhere is not None:
        reader.persistent_load = elsewhere
    return reader.load()
