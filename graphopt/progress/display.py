"""The display of progress bars, for terminals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from typing_extensions import override

__all__ = ["display"]

_shown: list[Progress] = []  # the display that is on, which what runs inside adds its bars to


class _Counts(ProgressColumn):
    """Done of all, rate and remaining time of a bar; nothing of a step, which has no parts."""

    def __init__(self) -> None:
        super().__init__()
        self._count, self._remaining = MofNCompleteColumn(), TimeRemainingColumn()

    @override
    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text()
        rate = f"{task.speed:.1f}/s" if task.speed and task.speed >= 1 else ""
        if task.speed and task.speed < 1:
            rate = f"{1 / task.speed:.1f} s each"
        parts = (self._count.render(task), Text(rate), self._remaining.render(task), Text("left"))
        return Text("  ").join(part for part in parts if part.plain)


@contextlib.contextmanager
def display(enabled: bool | None) -> Iterator[Progress | None]:
    """The display that is on, or a new one; None where bars are off."""
    console = Console(stderr=True)
    if enabled is False or (enabled is None and not console.is_terminal):
        yield None
        return
    if _shown:
        yield _shown[-1]
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24))
    with Progress(
        *columns, _Counts(), TimeElapsedColumn(), console=console, transient=True
    ) as shown:
        _shown.append(shown)
        try:
            yield shown
        finally:
            _shown.remove(shown)
