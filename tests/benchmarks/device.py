"""device.py [--size N]: clustering and error feedback by torch on each device here, beside the compiled code."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from graphopt.numerics.device import computing_on
from graphopt.numerics.feedback import TableMap, fit_tables
from graphopt.numerics.kmeans1d import cluster_1d


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
    for name, run in (("clustering", clustering), ("error feedback", feedback)):
        base, least = seconds(run, None)
        print(f"{name}: compiled {base:.3f} s")
        for device in devices:
            spent, error = seconds(run, device)
            print(
                f"  {device}: {spent:.3f} s, {base / spent:.2f} x as fast, error {error / least:.5f} x"
            )


if __name__ == "__main__":
    main()
