"""How packages load their parts: it imports nothing itself, so that torch, too, loads this way."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


def _grow_old() -> None:
    """Let the collector take all that there is for old, without looking through it, as it would at its next turn."""
    if not gc.get_freeze_count():  # of the caller's own, which would be released
        gc.freeze()
        gc.unfreeze()


@contextmanager
def uncollected() -> Iterator[None]:
    """Imports without collections of garbage: what they load stays, and full ones walk all of torch."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            _grow_old()
            gc.enable()
