"""Progress bars: shown on a terminal, silent elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["track"]

T = TypeVar("T")


def track(
    items: Iterable[T], description: str, total: int, *, enabled: bool | None = None
) -> Iterator[T]:
    """Yield `items` while a bar on standard error counts them.

    Args:
        items: What to pass on.
        description: Text before the bar.
        total: How many items there are.
        enabled: None shows the bar only on a terminal.
    """
    console = Console(stderr=True)
    if enabled is False or (enabled is None and not console.is_terminal) or total == 0:
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        for item in items:
            yield item
            bar.advance(task)
