"""Try calls on targets, each outcome on its own: `python op_sweep.py coreai [op …]`.

Calls run in a process of their own that is started again when one of them ends it. Several are one
program, as most of the time is that of a program; where it is not right, its halves are tried. A
program is captured once for all targets.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib
import multiprocessing
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import graphopt
from graphopt.backends.registry import targets
from graphopt.errors import GraphOptError

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.modules["helpers.op_sweep"] = sys.modules["__main__"]

from helpers.op_calls import OpCall, calls_of, counted_ops
from helpers.together import Together

__all__ = [
    "SUFFIXES",
    "Outcome",
    "Sweeper",
    "check_share",
    "sweep",
    "together_call",
    "write_table",
]

_SECONDS = 300
SUFFIXES = {target.value: target.suffix for target in targets()}
_OPTIONS: dict[str, dict[str, Any]] = {"coreml": {"precision": "float32"}}


@dataclass(frozen=True)
class Outcome:
    """What became of a call.

    Attributes:
        call: Its name.
        kind: "right", "refused", "wrong", "raw" (an exception that is not of graphopt.errors) or
            "died" (the process ended).
        said: The first line of the message, or the error's size.
        rewritten: Whether an op of it is one that the target's table of rules has.
    """

    call: str
    kind: str
    said: str = ""
    rewritten: bool = False


@functools.cache
def _rewritten_ops(target: str) -> frozenset[Any]:
    if target == "torch":
        return frozenset()
    found = importlib.import_module(f"graphopt.backends.{target}.decompose").rewritten_ops()
    return frozenset(found)


def _rewritten_parts(program: graphopt.Program, target: str) -> set[int]:
    """Places of the calls, in a program of several, with an op that the target has a rule for."""
    rules = _rewritten_ops(target)
    found = set()
    for node in program.export().run_decompositions({}).graph.nodes:
        if node.target in rules:
            paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
            places = [path.split(".")[1] for path in paths if path.startswith("parts.")]
            found.add(int(places[0]) if places else 0)
    return found


_made = functools.lru_cache(maxsize=64)(calls_of)


def _names(op: str) -> list[str]:
    return [call.name for call in _made(op)]


def _try(names: tuple[str, ...], target: str, rules: bool) -> list[Outcome]:
    """Outcomes of calls that are one program: of each if all are right, else one for all of them."""
    name = " ".join(names)
    captured = _captured(names)
    if not isinstance(captured, graphopt.Program):
        return [Outcome(name, *captured)]
    kind, said = _lowered(captured, target)
    if kind != "right":
        return [Outcome(name, kind, said)]
    parts = _rewritten_parts(captured, target) if rules else ()
    return [Outcome(name, kind, said, place in parts) for place, name in enumerate(names)]


@functools.lru_cache(maxsize=64)
def _captured(names: tuple[str, ...]) -> graphopt.Program | tuple[str, str]:
    """The program of several calls, or what became of it; PyTorch in eager mode says what is right."""
    call = together_call(
        [call for name in names for call in _made(name.split("#")[0]) if call.name == name]
    )
    try:
        with torch.no_grad():
            want = pytree.tree_leaves(call.module(*(x.clone() for x in call.inputs)))
        program = graphopt.capture(call.module, tuple(x.clone() for x in call.inputs))
        with torch.no_grad():
            ours = pytree.tree_leaves(program.module()(*(x.clone() for x in call.inputs)))
    except GraphOptError as error:
        return "refused", f"{type(error).__name__}: {_line(error)}"
    except Exception as error:
        return "raw", f"{type(error).__name__}: {_line(error)}"
    return program if _close(ours, want) else ("wrong", "captured program differs")


def _lowered(program: graphopt.Program, target: str) -> tuple[str, str]:
    """Lower, save and evaluate."""
    try:
        artifact = graphopt.lower(program, target, **_OPTIONS.get(target, {}))
        with tempfile.TemporaryDirectory() as folder:
            artifact.save(Path(folder) / f"m{SUFFIXES[target]}", verify=False)
            found = artifact.verify()
    except GraphOptError as error:
        return "refused", f"{type(error).__name__}: {_line(error)}"
    except Exception as error:
        return "raw", f"{type(error).__name__}: {_line(error)}"
    if not found.complete:
        return "refused", f"not evaluable: {'; '.join(found.notes)}"
    return "right" if found.holds else "wrong", f"{found.max_error:.2g}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _close(ours: list[Any], want: list[Any]) -> bool:
    tensors = [x for x in ours if isinstance(x, torch.Tensor)]
    return len(tensors) == len(want) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4, equal_nan=True)
        for a, b in zip(tensors, want, strict=True)
    )


def together_call(calls: Sequence[OpCall]) -> OpCall:
    if len(calls) == 1:
        return calls[0]
    inputs = tuple(x for call in calls for x in call.inputs)
    module = Together((call.module for call in calls), (len(call.inputs) for call in calls)).eval()
    return OpCall(" ".join(call.name for call in calls), module, inputs)


def _serve(pipe: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):  # the other end is closed
        while True:
            function, *args = pipe.recv()
            pipe.send(function(*args))


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function of this module returns in the process.

        Raises:
            EOFError: The process ended, or took too long.
        """
        self.pipe.send((function, *args))
        if not self.pipe.poll(_SECONDS):
            self.process.kill()
            raise EOFError
        return self.pipe.recv()


class Sweeper:
    """A process that tries calls; targets that are swept one after the other share captured programs.

    Args:
        together: Calls that are tried as one program; where that is not right, its halves are.
        rules: Whether outcomes say which calls have ops that the target has rules for, which takes
            an export per program.
    """

    def __init__(self, together: int = 8, *, rules: bool = False) -> None:
        self.together, self.rules = together, rules
        self._worker = _Worker()

    def sweep(self, target: str, ops: Iterable[str]) -> Iterator[Outcome]:
        """Outcomes of every call of these ops on a target."""
        names = [name for op in ops for name in self._worker.ask(_names, op)]
        size = self.together
        groups = [tuple(names[first : first + size]) for first in range(0, len(names), size)]
        groups.reverse()
        while groups:
            group = groups.pop()
            try:
                outcomes = self._worker.ask(_try, group, target, self.rules)
            except (EOFError, ConnectionError):
                self._worker = _Worker()
                outcomes = [Outcome(group[0], "died")]
            if len(outcomes) == len(group):
                yield from outcomes
            else:
                half = len(group) // 2
                groups += [group[half:], group[:half]]

    def close(self) -> None:
        """End the process, by itself where it can."""
        with contextlib.suppress(Exception):
            self._worker.pipe.close()
            self._worker.process.join(10)
            self._worker.process.kill()


def sweep(target: str, ops: Iterable[str], together: int = 8) -> list[Outcome]:
    """Outcomes of every call of these ops on one target, with the rules that each takes."""
    with contextlib.closing(Sweeper(together, rules=True)) as sweeper:
        return list(sweeper.sweep(target, ops))


def check_share(outcomes: Sequence[Outcome], share: float) -> None:
    """Each is right or refused, and at least this share is right."""
    counts = Counter(outcome.kind for outcome in outcomes)
    lapses = [outcome for outcome in outcomes if outcome.kind not in ("right", "refused")]
    assert not lapses, "\n".join(f"{o.kind}: {o.call}: {o.said}" for o in lapses)
    assert counts["right"] >= share * len(outcomes), counts


def write_table(outcomes: Iterable[Outcome], path: Path) -> None:
    """Write outcomes as CSV, one row a call."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("call", "outcome", "rewritten", "said"))
        for outcome in outcomes:
            rewritten = "yes" if outcome.rewritten else ""
            table.writerow((outcome.call, outcome.kind, rewritten, outcome.said))


def main() -> None:
    """Print each outcome that is not right and the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--together", type=int, default=8)
    parser.add_argument("--table", type=Path, help="a CSV file of the outcomes")
    parser.add_argument("--all", action="store_true", help="print what is right too")
    chosen = parser.parse_args()
    outcomes = []
    sweeper = Sweeper(chosen.together, rules=chosen.table is not None)
    for outcome in sweeper.sweep(chosen.target, chosen.ops or counted_ops()[:: chosen.every]):
        outcomes.append(outcome)
        if outcome.kind != "right" or chosen.all:
            print(f"{outcome.kind:8} {outcome.call}: {outcome.said}", flush=True)
    sweeper.close()
    counts = Counter(outcome.kind for outcome in outcomes)
    tried = {outcome.call.split("#")[0] for outcome in outcomes}
    print(f"{len(outcomes)} calls of {len(tried)} ops: {dict(counts)}")
    if chosen.table:
        write_table(outcomes, chosen.table)


if __name__ == "__main__":
    main()
