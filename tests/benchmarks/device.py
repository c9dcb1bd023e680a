"""device.py [--size N]: clustering, fitting, tuning and soft palettes by torch on each device here.

Clustering and error feedback, of scalars and of pairs along columns, stand beside the compiled code; tuning
and soft palettes beside torch on the CPU without a device.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

import graphopt
from graphopt.numerics.device import chosen_device, computing_on
from graphopt.numerics.feedback import TableMap, fit_tables
from graphopt.numerics.feedback_columns import ColumnMap, fit_column_tables
from graphopt.numerics.kmeans1d import cluster_1d
from graphopt.numerics.kmeans_nd import VectorSearch, cluster_vectors
from graphopt.numerics.soft_palette import soft_palette
from graphopt.passes.tune import tune

_Work = Callable[[], float]


def seconds(run: Callable[[], float], device: str | None) -> tuple[float, float]:
    """Seconds of the second of two runs, and the error that it reached."""
    with computing_on(device):
        run()
        started = time.perf_counter()
        error = run()
        return time.perf_counter() - started, error


def main() -> None:
    """Print seconds, errors and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024)
    size = parser.parse_args().size
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator)
    inputs = torch.randn(4 * size, size, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)
    where = TableMap(np.arange(size), np.zeros(size, np.int64), 1)
    tables = cluster_1d(weight, [16])[16].tables[..., None]

    pairs = weight.reshape(1, -1, 2)
    numbers = torch.arange(size * size // 2).reshape(size, -1).repeat_interleave(2, 1)
    along = ColumnMap.of(numbers, size * size // 2, 2)
    assert along is not None
    starts = cluster_vectors(pairs, 16, search=VectorSearch(max_steps=4))[0]

    def vectors() -> float:
        return float(cluster_vectors(pairs, 16, search=VectorSearch(max_steps=20))[2].sum())

    def vector_feedback() -> float:
        return fit_column_tables(weight, hessian, starts, along, rounds=2).error

    def palettes() -> float:
        place = chosen_device() or torch.device("cpu")
        given = weight.reshape(1, -1, 1).to(place).requires_grad_()
        start = torch.linspace(-2, 2, 16).reshape(1, 16, 1).to(place)
        mixed, _ = soft_palette(given, start, torch.full((1,), 0.02, device=place), 3)
        error = (mixed - given.detach()).square().sum()
        error.backward()
        return float(error.detach())

    def clustering() -> float:
        return float(cluster_1d(weight, [16])[16].sse.sum())

    def feedback() -> float:
        return fit_tables(weight, hessian, tables, where, rounds=2).error

    devices = ["cpu"]
    devices += ["cuda"] if torch.cuda.is_available() else []
    devices += ["mps"] if torch.backends.mps.is_available() else []
    print(
        f"{size} x {size}, 4 bits per row; ratios are those of the compiled code's time and error"
    )
    jobs: dict[str, _Work] = {
        "clustering": clustering,
        "error feedback": feedback,
        "clustering of pairs": vectors,
        "error feedback of pairs": vector_feedback,
        "soft palettes": palettes,
        "tuning, 20 steps": _tuning(size),
    }
    for name, run in jobs.items():
        base, least = seconds(run, None)
        print(f"{name}: without a device {base:.3f} s")
        for device in devices:
            spent, error = seconds(run, device)
            ratio = base / spent
            print(f"  {device}: {spent:.3f} s, {ratio:.2f} x as fast, error {error / least:.5f} x")


def _tuning(size: int) -> _Work:
    """Tuning of two layers of that size on eight calls."""
    torch.manual_seed(0)
    layers = (torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, size))
    program = graphopt.capture(torch.nn.Sequential(*layers).eval(), (torch.randn(64, size),))
    made = graphopt.compress(program, progress=False)
    data = [torch.randn(64, size) for _ in range(8)]

    def run() -> float:
        place = chosen_device()
        device = None if place is None else str(place)
        tuned = tune(made, program, data, steps=20, progress=False, device=device)
        with torch.no_grad():
            pairs = ((tuned.module()(x), program.module()(x)) for x in data)
            return float(sum((mine - exact).square().sum() for mine, exact in pairs))

    return run


if __name__ == "__main__":
    main()
