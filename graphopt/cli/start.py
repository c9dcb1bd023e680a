"""Entry point of the command: the process is its own, so that loading it collects no garbage."""

from __future__ import annotations

import gc

from graphopt.extras import deferred

__all__ = ["run"]

_main = deferred("graphopt.cli.main")


def run() -> None:
    """Load the commands and run the one that was asked for.

    Modules that are loaded stay; full collections while they are would walk all of them again and again.
    """
    gc.disable()
    command = _main.run
    gc.freeze()
    gc.enable()
    command()
