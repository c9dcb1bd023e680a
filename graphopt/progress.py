"""Progress bars: shown on a terminal, silent elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

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

__all__ = ["step", "track"]

T = TypeVar("T")
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
def _display(enabled: bool | None) -> Iterator[Progress | None]:
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
    ) as display:
        _shown.append(display)
        try:
            yield display
        finally:
            _shown.remove(display)


def track(
    items: Iterable[T], description: str, total: int, *, enabled: bool | None = None
) -> Iterator[T]:
    """Yield `items` while a bar on standard error counts them, with rate and remaining time.

    Bars of what runs between two items stand below it.

    Args:
        items: What to pass on.
        description: What is done, before the bar.
        total: How many items there are.
        enabled: None shows the bar only on a terminal.
    """
    if total == 0:
        yield from items
        return
    with _display(enabled) as display:
        if display is None:
            yield from items
            return
        task = display.add_task(description, total=total)
        try:
            for item in items:
                yield item
                display.advance(task)
        finally:
            display.remove_task(task)


@contextlib.contextmanager
def step(description: str, *, enabled: bool | None = None) -> Iterator[None]:
    """Name what is going on and how long it has taken, while it does.

    Args:
        description: What is done.
        enabled: None shows it only on a terminal.
    """
    with _display(enabled) as display:
        if display is None:
            yield
            return
        task = display.add_task(description, total=None)
        try:
            yield
        finally:
            display.remove_task(task)
