"""Progress bars: shown on a terminal, silent elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from graphopt.extras import deferred

if TYPE_CHECKING:
    from rich.progress import Progress

    from graphopt.progress import display as progress_display
else:
    progress_display = deferred("graphopt.progress.display")

__all__ = ["step", "track"]

T = TypeVar("T")
# what lets a display be on where standard error is no terminal
_SETTINGS = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


def _display(enabled: bool | None) -> contextlib.AbstractContextManager[Progress | None]:
    """The display that is on, or a new one; None where bars are off."""
    if enabled is False or (enabled is None and not _may_show()):
        return contextlib.nullcontext()
    return progress_display.display(enabled)


def _may_show() -> bool:
    """Whether the display is worth its import to find out if it can be seen."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return terminal or "IPython" in sys.modules or any(name in os.environ for name in _SETTINGS)


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
