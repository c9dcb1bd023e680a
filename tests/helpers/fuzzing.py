"""How fuzzers count, how long they run, and what every one of them takes for right.

`GRAPHOPT_FUZZ` is the number of examples of a test (a small fixed set where it is not given),
`GRAPHOPT_FUZZ_COUNTS` a file to which counts are appended: kind, tried, held, wrong; `GRAPHOPT_FUZZ_LAST` a
file that holds the example that is being tried, for where the process dies of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from graphopt.errors import GraphOptError

__all__ = ["LONG", "budget", "counted", "remembered"]

LONG = int(os.environ.get("GRAPHOPT_FUZZ", "0"))


def budget(few: int, share: float = 1.0) -> Callable[[Any], Any]:
    """Settings of a fuzzer: `few` fixed examples, or `share` of as many as are asked for.

    Args:
        few: Examples where nothing is asked for; the same ones every time.
        share: What part of `GRAPHOPT_FUZZ` this test takes; slower ones take less.
    """
    return settings(
        max_examples=max(1, round(LONG * share)) if LONG else few,
        derandomize=not LONG,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def counted(kind: str, *, whole: bool = False) -> Iterator[None]:
    """Count what is tried inside: it holds if it ends well or with an error of graphopt.

    What is `whole`, broken in nothing, must end well: otherwise nothing that is refused says anything.
    Each outcome is written at once, so that none is lost where a run is stopped or dies.
    """
    outcome = "died"
    _write(kind, "tried")
    try:
        yield
        outcome = "done"
    except GraphOptError:
        outcome = "wrong" if whole else "refused"
        if whole:
            raise
    except (KeyboardInterrupt, SystemExit):
        outcome = "stopped"
        raise
    except BaseException:
        outcome = "wrong"
        raise
    finally:
        _write(kind, outcome)


def remembered(example: object) -> None:
    """Write down what is tried next: a process that dies says nothing, and hypothesis has no smaller one."""
    path = os.environ.get("GRAPHOPT_FUZZ_LAST")
    if path:
        Path(path).write_text(repr(example), encoding="utf-8")


def _write(kind: str, what: str) -> None:
    path = os.environ.get("GRAPHOPT_FUZZ_COUNTS")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "what": what, "n": 1}) + "\n")
