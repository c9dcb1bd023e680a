"""Independent tasks come out the same on threads, processes and a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.pools import POOLS, Immediate, processes
from torch import Tensor, nn

import graphopt
from graphopt.errors import CompressionError, InputError, MissingDependencyError
from graphopt.palettization import KMeansPalettizer
from graphopt.run.workers import Task, Workers, dask_workers, executor_of, run_tasks


def scaled(tensors: Mapping[str, Tensor], factor: float) -> tuple[Tensor, int]:
    return factor * tensors["weight"], os.getpid()


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"w{n}": torch.randn(8 + n, 4, generator=generator) for n in range(7)}


def tasks() -> Iterator[Task]:
    for number, weight in enumerate(weights().values()):
        yield Task((float(number),), {"weight": weight})


@pytest.mark.parametrize("pool", POOLS)
def test_results_come_in_order_whatever_runs_the_tasks(pool: Callable[[], Executor]) -> None:
    with pool() as executor:
        found = list(run_tasks(scaled, tasks(), executor))
    for (value, process), weight, factor in zip(found, weights().values(), range(7), strict=True):
        assert torch.equal(value, factor * weight)
        assert (process != os.getpid()) == (pool is processes)


def test_tensors_lie_in_the_shared_folder_and_not_in_the_tasks(tmp_path: Path) -> None:
    executor = Immediate()
    list(
        run_tasks(
            scaled, [Task((2.0,), {"weight": torch.ones(1000, 100)})], Workers(executor, tmp_path)
        )
    )
    (sent,) = executor.sent
    assert str(tmp_path).encode() in sent[1]
    assert sum(len(part) for part in sent if isinstance(part, str | bytes)) < 1000
    assert not list(tmp_path.iterdir())


def summed(tensors: Mapping[str, Tensor], more: list[Tensor]) -> Tensor:
    return tensors["weight"] + sum(more)


def test_what_several_tasks_read_lies_in_one_file(tmp_path: Path) -> None:
    shared, counts = torch.arange(6.0).reshape(2, 3), []

    def given() -> Iterator[Task]:
        for number in range(3):
            yield Task(([shared, shared.T.reshape(2, 3)],), {"weight": torch.full((2, 3), number)})
            counts.append(len(list(tmp_path.rglob("*.bin"))))

    found = list(run_tasks(summed, given(), Workers(Immediate(), tmp_path)))
    for number, value in enumerate(found):
        assert torch.equal(value, number + shared + shared.T.reshape(2, 3))
    assert counts == [3, 5, 7]  # the copy is another one in every task


def test_few_tasks_wait_at_a_time_and_the_rest_is_never_read_after_an_error() -> None:
    read = []

    def endless() -> Iterator[Task]:
        for number in range(1000):
            read.append(number)
            yield Task((), {})  # the function wants a factor

    with ThreadPoolExecutor(2) as executor, pytest.raises(TypeError):
        list(run_tasks(scaled, endless(), executor))
    assert len(read) <= 5


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)
    )


@pytest.mark.parametrize("pool", POOLS)
def test_palettes_do_not_depend_on_the_executor(pool: Callable[[], Executor]) -> None:
    model, x = net(), torch.randn(2, 24)
    here = KMeansPalettizer(model)
    here.prepare((x,))
    there = KMeansPalettizer(model)
    with pool() as executor:
        there.prepare((x,), executor=executor)
        other = graphopt.compress(model, (x,), executor=executor)
    expected = here.program().graph_module.state_dict()
    for program in (there.program(), other):
        found = program.graph_module.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_errors_of_workers_name_the_weight() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[3, 3] = float("nan")
    with pytest.raises(CompressionError, match=r"2\.weight"):
        graphopt.compress(model, (torch.randn(2, 24),), executor=Immediate())


def test_what_is_no_executor_is_refused() -> None:
    assert executor_of(None) is None
    with pytest.raises(InputError, match="Dask client or cluster, got int"):
        executor_of(4)


def test_without_dask_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with (
        pytest.raises(MissingDependencyError, match=r"graphopt\[distributed\]"),
        dask_workers("tcp://127.0.0.1:1"),
    ):
        pass
    with dask_workers(None) as workers:
        assert workers is None


@pytest.mark.slow
def test_a_dask_cluster_gives_the_same_palettes(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    model, x = net(), torch.randn(2, 24)
    expected = graphopt.compress(model, (x,)).graph_module.state_dict()
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
        dask_workers(cluster.scheduler_address, tmp_path) as workers,
    ):
        for given in (client, cluster, workers):
            found = graphopt.compress(model, (x,), executor=given).graph_module.state_dict()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list(tmp_path.iterdir())
