"""Kill processes at random moments of analyze, sweep, rdo, compress and lower, and go on with them.

python tests/fuzz/kills.py --kills 200: after every kill the same call is made again; at last its result must be
that of a call that nobody stopped, and nothing but results may be left in the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphopt
from graphopt import rdo
from graphopt.mixed_precision import analyze
from graphopt.palettization import KMeansPalettizerConfig

__all__ = ["CALLS", "kill_often"]

X = torch.linspace(-1, 1, 512).reshape(16, 32)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(32, 8))


def digest(path: Path) -> str:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    content = b"".join(file.read_bytes() for file in files if file.is_file())
    return hashlib.sha256(content).hexdigest()


def score(module: nn.Module) -> float:
    with torch.no_grad():
        return -float(module(X).square().mean())


def run_analyze(folder: Path) -> str:
    batches = list(X.split(4))
    table = analyze(net(), (X[:4],), [2, 3, 4, 6], batches, "mse", path=folder / "t.jsonl")
    return str(table.values())


def run_sweep(folder: Path) -> str:
    table = analyze(net(), (X[:4],), [2, 4, 6], [X], "mse")
    return str(table.sweep([3, 4, 5], score, path=folder / "s.jsonl", progress=False).points)


def run_rdo(folder: Path) -> str:
    config = {"target_bits": 6, "draws": 1, "rounding": {"blocks": "all", "steps": 20}}
    out = folder / "rdo"
    program, _ = rdo.optimize(
        net(), (X[:4],), list(X.split(4)), config, out=out, overwrite=True, progress=False
    )
    state = program.module().state_dict()
    content = b"".join(value.contiguous().numpy().tobytes() for value in state.values())
    return hashlib.sha256(content).hexdigest()


def run_compress(folder: Path) -> str:
    made = graphopt.compress(net(), (X[:4],), KMeansPalettizerConfig())
    made.save(folder / "m.pt2", overwrite=True)
    return digest(folder / "m.pt2")


def run_tune(folder: Path) -> str:
    made = graphopt.compress(
        net(),
        (X[:4],),
        KMeansPalettizerConfig(),
        calibration_data=[X],
        tune_steps=5,
        progress=False,
    )
    made.save(folder / "m.pt2", overwrite=True)
    return digest(folder / "m.pt2")


def run_lower(folder: Path) -> str:
    graphopt.lower(net(), "torch", (X[:4],)).save(folder / "l.pt2", overwrite=True)
    return digest(folder / "l.pt2")


CALLS: dict[str, tuple[Callable[[Path], str], set[str]]] = {
    "analyze": (run_analyze, {"t.jsonl"}),
    "sweep": (run_sweep, {"s.jsonl"}),
    "rdo": (run_rdo, {"rdo"}),
    "compress": (run_compress, {"m.pt2"}),
    "tuning": (run_tune, {"m.pt2"}),
    "lower": (run_lower, {"l.pt2"}),
}


def _quiet(call: Callable[[Path], str], folder: Path) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    call(folder)


def kill_often(name: str, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill a call some times, each at a random moment, then let it end.

    Returns:
        Kills that hit a running call, and how often the result or the folder was not as it must be.
    """
    call, expected = CALLS[name]
    draw = random.Random(seed)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        (folder / "whole").mkdir()
        started = time.perf_counter()
        wanted = call(folder / "whole")
        took = time.perf_counter() - started
        hit = wrong = 0
        broken = folder / "broken"
        broken.mkdir()
        while hit < kills:
            child = context.Process(target=_quiet, args=(call, broken))
            child.start()
            child.join(draw.random() * took * 1.2)
            if child.is_alive() and child.pid is not None:
                os.kill(child.pid, draw.choice(SIGNALS))
                hit += 1
            child.join()
            if draw.random() < 0.2 or hit == kills:
                result: Any = call(broken)
                left = {path.name for path in broken.iterdir()}
                wrong += int(result != wanted or left != expected)
        return {"tried": hit, "wrong": wrong}


def main() -> None:
    """Print what became of the kills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for number, name in enumerate(CALLS):
        share = given.kills // len(CALLS) + (number < given.kills % len(CALLS))
        print(name, kill_often(name, share, given.seed + number), flush=True)


if __name__ == "__main__":
    main()
