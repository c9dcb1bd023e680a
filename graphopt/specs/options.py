"""Options: values that say how something is done, declared once for Python, files and the shell."""

from __future__ import annotations

import difflib
import inspect
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from graphopt.errors import OptionError

__all__ = ["Options", "field_help"]

_ATTRIBUTE = re.compile(r"^(\w+): (.*)$")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of option objects: a frozen dataclass whose fields all have defaults.

    Each field is documented under "Attributes" of its class, from where the shell takes its help; a
    `TypedDict` of the same fields beside it types the keywords of a call.
    """

    @classmethod
    def of(cls, call: str, given: Mapping[str, Any]) -> Self:
        """From the keywords of a call, or a mapping of a file.

        Args:
            call: Name of what was called, for the message.
            given: Option → value; the others have their defaults.

        Raises:
            OptionError: There is no such option, and the message has the closest one; or a value is of
                another type.
        """
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it has {known}"
                raise OptionError(f"{call} has no option {name!r}{hint}")
        hints = get_type_hints(cls)
        for name, value in given.items():
            if not _fits(value, hints[name]):
                raise OptionError(f"{call}: {name} is {value!r}, which is no {_words(hints[name])}")
        return cls(**given)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """From plain values, such as those of a YAML file.

        Raises:
            OptionError: There is no such option, or a value is of another type.
        """
        if not isinstance(data, Mapping):
            raise OptionError(f"{cls.__name__}: expected a mapping, got {type(data).__name__}")
        return cls.of(cls.__name__, data)


def _words(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint)).replace("typing.", "")


def _fits(value: object, hint: Any) -> bool:
    """Whether a value may stand where a type is asked for; numbers of numpy are numbers."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        # which of them it is, is said by what knows what each of them does
        return any(isinstance(value, type(one)) for one in inner)
    if origin is not None and isinstance(origin, type):
        text = isinstance(value, str | bytes) and issubclass(origin, Sequence | Iterable)
        return isinstance(value, origin) and not text
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def field_help(options: type) -> dict[str, str]:
    """Field → the first sentence of what the class documents of it under "Attributes"."""
    return {name: _first_sentence(text) for name, text in _documented(options).items()}


def _first_sentence(text: str) -> str:
    end = re.search(r"\.(?= [A-Z`\"]|$)", text)
    return text if end is None else text[: end.end()]


def _documented(options: type) -> dict[str, str]:
    """Field → its text under "Attributes", base classes included."""
    texts: dict[str, str] = {}
    for base in reversed(options.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        name = ""
        for line in map(str.strip, section.splitlines()):
            start = _ATTRIBUTE.match(line)
            if start is not None:
                name, texts[start[1]] = start[1], start[2]
            elif name and line:
                texts[name] += f" {line}"
    return texts
