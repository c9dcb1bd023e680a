"""workers.py [--width N] [--layers N] [--rounds N]: what a second worker gains in clustering.

Seconds of `compress` with an executor of one and of two workers in turn, best of the rounds; one thread in each
worker, started beforehand. Programs are compared byte by byte.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor

import torch
from torch import nn

import graphopt
from graphopt.palettization import KMeansPalettizerConfig

SCALARS = {
    "n_bits": 4,
    "granularity": {"type": "per_grouped_channel", "axis": 0, "group_size": 16},
}
VECTORS = {"n_bits": 6, "cluster_dim": 2}


def config_of(spec: dict[str, object]) -> KMeansPalettizerConfig:
    """A config of one spec for all weights."""
    return KMeansPalettizerConfig.from_dict({"global_config": {"op_state_spec": {"weight": spec}}})


def pool_of(kind: str, workers: int) -> Executor:
    """Workers that have imported and compiled what they need."""
    pool: Executor
    if kind == "threads":
        pool = ThreadPoolExecutor(workers)
    else:
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    small = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    program = graphopt.capture(small, (torch.randn(2, 64),))
    for spec in (SCALARS, VECTORS):
        graphopt.compress(program, None, config_of(spec), executor=pool, progress=False)
    return pool


def main() -> None:
    """Print a row for every form and kind of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(given.width, given.width) for _ in range(given.layers)))
    program = graphopt.capture(model.eval(), (torch.randn(2, given.width),))
    print("tables   workers    one, s  two, s  ratio")
    for form, spec in (("scalars", SCALARS), ("vectors", VECTORS)):
        for kind in ("threads", "processes"):
            pools = {workers: pool_of(kind, workers) for workers in (1, 2)}
            best = dict.fromkeys(pools, float("inf"))
            found = {}
            for _ in range(given.rounds):
                for workers, pool in pools.items():
                    started = time.perf_counter()
                    result = graphopt.compress(
                        program, None, config_of(spec), executor=pool, progress=False
                    )
                    best[workers] = min(best[workers], time.perf_counter() - started)
                    found[workers] = result.graph_module.state_dict()
            for pool in pools.values():
                pool.shutdown()
            if not all(torch.equal(found[1][name], found[2][name]) for name in found[1]):
                raise SystemExit(f"{form} on {kind}: two workers found other tables than one")
            print(
                f"{form:8} {kind:9} {best[1]:7.2f} {best[2]:7.2f} {best[1] / best[2]:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
