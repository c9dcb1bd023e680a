"""Options: values that say how something is done, declared once for Python, files and the shell."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

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
            OptionError: There is no such option; the message has the closest one.
        """
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it has {known}"
                raise OptionError(f"{call} has no option {name!r}{hint}")
        return cls(**given)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """From plain values, such as those of a YAML file.

        Raises:
            OptionError: There is no such option; the message has the closest one.
        """
        return cls.of(cls.__name__, data)


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
