"""Run independent tasks on the cores that torch may use; results never depend on their number."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["map_tasks"]

T = TypeVar("T")
R = TypeVar("R")
_inside = threading.local()


def map_tasks(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map(function, items)` on threads, in the order of `items`.

    Only worth it for functions that release the GIL. Called from within a task it runs inline, so
    that nesting cannot exhaust the pool.
    """
    pending = list(items)
    workers = min(torch.get_num_threads(), len(pending))
    if workers <= 1 or getattr(_inside, "task", False):
        yield from map(function, pending)
        return

    def guarded(item: T) -> R:
        _inside.task = True
        try:
            return function(item)
        finally:
            _inside.task = False

    pool = ThreadPoolExecutor(workers, thread_name_prefix="graphopt")
    try:
        yield from pool.map(guarded, pending)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
