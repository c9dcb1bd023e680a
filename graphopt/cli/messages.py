"""Warnings of a command: ours alone, one line per kind with a count, behind what it prints."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typing_extensions import override

from graphopt import errors
from graphopt.cli.common import ERR

__all__ = ["grouped_warnings"]

_OURS = (errors.ConfigWarning, errors.DependencyVersionWarning)
_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|[\w.]*\d[\w.]*|[\w]+(?:\.[\w]+)+")


class _Kinds(logging.Handler):
    """Counts warnings that say the same of different things."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: dict[str, list[str]] = {}

    @override
    def emit(self, record: logging.LogRecord) -> None:
        kind = str(record.msg) if record.args else _kind(record.getMessage())
        self.add(kind, record.getMessage())

    def add(self, kind: str, text: str) -> None:
        """Note one; repeated texts count once."""
        known = self.texts.setdefault(kind, [])
        if text not in known:
            known.append(text)

    def show(self) -> None:
        """One line per kind."""
        for first, *others in self.texts.values():
            more = f" (and {len(others)} more of this kind)" if others else ""
            ERR.print("[yellow]warning[/yellow]: ", end="")
            ERR.print(first + more, markup=False, highlight=False)


def _kind(text: str) -> str:
    """A text without names and numbers."""
    return _PARTICULAR.sub("…", text)


@contextmanager
def grouped_warnings() -> Iterator[None]:
    """Show what our loggers and warnings say, at the end; nothing of other packages'."""
    kinds, own = _Kinds(), logging.getLogger("graphopt")
    propagated, own.propagate = own.propagate, False
    own.addHandler(kinds)

    def take(message: Warning | str, category: type[Warning], *place: Any) -> None:
        del place
        if issubclass(category, _OURS):
            kinds.add(_kind(str(message)), str(message))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for category in _OURS:
                warnings.simplefilter("always", category)
            warnings.showwarning = take  # type: ignore[assignment]
            yield
    finally:
        own.removeHandler(kinds)
        own.propagate = propagated
        kinds.show()
