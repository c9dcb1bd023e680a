"""Entry point of the command: the process is its own, so that loading it collects no garbage."""

from __future__ import annotations

import atexit
import gc

from graphopt.extras import deferred
from graphopt.loading import uncollected

__all__ = ["run"]

_main = deferred("graphopt.cli.main")


def run() -> None:
    """Load the commands and run the one that was asked for.

    Modules that are loaded stay; full collections while they are would walk all of them again and again.
    What works on programs then sets them aside itself (`graphopt.exclusive`), which it could not tell
    from what the caller had set aside. What is left at the end goes with the process, and is not looked
    through once more.
    """
    atexit.register(gc.freeze)
    with uncollected():
        command = _main.run
    command()
