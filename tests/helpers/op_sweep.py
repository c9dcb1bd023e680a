"""Try calls on a target, each outcome on its own: `python op_sweep.py coreai [op …]`.

Calls run in a process of their own that is started again when one of them ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Outcome", "sweep"]

_SECONDS = 120
_SUFFIXES = {"coreai": ".aimodel", "coreml": ".mlpackage", "executorch": ".pte", "torch": ".pt2"}
_OPTIONS: dict[str, dict[str, Any]] = {"coreml": {"precision": "float32"}}


@dataclass(frozen=True)
class Outcome:
    """What became of a call.

    Attributes:
        call: Its name.
        kind: "right", "refused", "wrong", "raw" (an exception that is not of graphopt.errors) or
            "died" (the process ended).
        said: The first line of the message, or the error's size.
    """

    call: str
    kind: str
    said: str = ""


def try_call(call: Any, target: str) -> Outcome:
    """Capture, lower, save and evaluate; the right value comes from PyTorch in eager mode."""
    import torch
    from torch.utils import _pytree as pytree

    import graphopt
    from graphopt.errors import GraphOptError

    try:
        with torch.no_grad():
            want = pytree.tree_leaves(call.module(*(x.clone() for x in call.inputs)))
        program = graphopt.capture(call.module, tuple(x.clone() for x in call.inputs))
        with torch.no_grad():
            ours = pytree.tree_leaves(program.module()(*(x.clone() for x in call.inputs)))
        if not _close(ours, want):
            return Outcome(call.name, "wrong", "captured program differs")
        artifact = graphopt.lower(program, target, **_OPTIONS.get(target, {}))
        with tempfile.TemporaryDirectory() as folder:
            artifact.save(Path(folder) / f"m{_SUFFIXES[target]}", verify=False)
            found = artifact.verify()
    except GraphOptError as error:
        return Outcome(call.name, "refused", f"{type(error).__name__}: {_line(error)}")
    except Exception as error:
        return Outcome(call.name, "raw", f"{type(error).__name__}: {_line(error)}")
    if not found.complete:
        return Outcome(call.name, "refused", f"not evaluable: {'; '.join(found.notes)}")
    kind = "right" if found.holds else "wrong"
    return Outcome(call.name, kind, f"{found.max_error:.2g}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _close(ours: list[Any], want: list[Any]) -> bool:
    import torch

    tensors = [x for x in ours if isinstance(x, torch.Tensor)]
    return len(tensors) == len(want) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4, equal_nan=True)
        for a, b in zip(tensors, want, strict=True)
    )


def _serve(pipe: Any, target: str) -> None:
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    from helpers.op_calls import calls_of

    while True:
        op, done = pipe.recv()
        for call in calls_of(op):
            if call.name not in done:
                pipe.send(call.name)
                pipe.send(try_call(call, target))
        pipe.send(None)


class _Worker:
    def __init__(self, target: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, target), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: The process ended, or took too long.
        """
        if not self.pipe.poll(_SECONDS):
            self.process.kill()
            raise EOFError
        return self.pipe.recv()


def sweep(target: str, ops: Iterable[str]) -> Iterator[Outcome]:
    """Outcomes of every call of these ops on a target."""
    worker = _Worker(target)
    for op in ops:
        done: list[str] = []
        while True:
            current = None
            try:
                worker.pipe.send((op, done))
                while (message := worker.receive()) is not None:
                    if isinstance(message, str):
                        current = message
                    else:
                        done.append(message.call)
                        current = None
                        yield message
                break
            except (EOFError, ConnectionError):
                worker = _Worker(target)
                if current is None:
                    break
                done.append(current)
                yield Outcome(current, "died")
    with contextlib.suppress(Exception):
        worker.process.kill()


def main() -> None:
    """Print each outcome that is not right and the counts; write all of them as JSON."""
    from helpers.op_calls import counted_ops

    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--all", action="store_true", help="print what is right too")
    chosen = parser.parse_args()
    outcomes = []
    for outcome in sweep(chosen.target, chosen.ops or counted_ops()[:: chosen.every]):
        outcomes.append(outcome)
        if outcome.kind != "right" or chosen.all:
            print(f"{outcome.kind:8} {outcome.call}: {outcome.said}", flush=True)
    counts = Counter(outcome.kind for outcome in outcomes)
    tried = {outcome.call.split("#")[0] for outcome in outcomes}
    print(f"{len(outcomes)} calls of {len(tried)} ops: {dict(counts)}")
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.modules["helpers.op_sweep"] = sys.modules["__main__"]
    main()
