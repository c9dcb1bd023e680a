"""Values beyond a limit come back from files as they were."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

import graphopt
from graphopt.ir.mapped import is_mapped
from graphopt.run.activation_store import ActivationStore
from graphopt.run.batches import as_batch
from graphopt.run.layerwise import LayerwiseRun


def test_values_beyond_the_limit_lie_in_files_with_their_strides(tmp_path: Path) -> None:
    store = ActivationStore(1000, tmp_path)
    small, large = torch.arange(200.0), torch.arange(600.0).reshape(20, 30).T
    first, second = store.kept(small), store.kept(large)
    assert first is small
    assert store.resident == 800
    assert is_mapped(second)
    assert torch.equal(second, large)
    assert second.stride() == large.stride()
    store.dropped([first])
    assert store.resident == 0
    store.rest([second])
    assert torch.equal(second, large)
    kept = store.kept(torch.ones(250))
    assert not is_mapped(kept)


def test_views_of_one_storage_share_a_file(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    parts = ActivationStore(0, tmp_path).kept(whole.split([2, 4], dim=1))
    assert [is_mapped(part) for part in parts] == [True, True]
    assert parts[0].untyped_storage().data_ptr() == parts[1].untyped_storage().data_ptr()
    assert torch.equal(torch.cat(parts, 1), whole)


def test_files_are_gone_with_their_values(tmp_path: Path) -> None:
    store = ActivationStore(0, tmp_path)
    value = store.kept(torch.ones(100_000))
    if os.name != "nt":
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert float(value.sum()) == 100_000
    del value, store
    assert not list(tmp_path.iterdir())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.second(self.first(x).relu()).split(8, dim=1)
        return x[:, :8] + low.T.mT * high


def test_runs_give_the_same_and_hold_no_more_than_the_limit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    data = [torch.randn(32, 16) for _ in range(3)]
    gm = graphopt.capture(model, (data[0],)).graph_module
    batches = [as_batch(x) for x in data]
    store, peaks = ActivationStore(10_000, tmp_path), []
    runs = LayerwiseRun(gm, batches), LayerwiseRun(gm, batches, store)
    for node in gm.graph.nodes:
        if node.op != "output":
            for run in runs:
                run.step(node)
            peaks.append(store.resident)
            if not runs[0].is_constant(node) and runs[0].has_values(node):
                for plain, kept in zip(runs[0].values(node), runs[1].values(node), strict=True):
                    torch.testing.assert_close(kept, plain, rtol=0, atol=0)
    assert 0 < max(peaks) <= 10_000
    (output,) = gm.graph.find_nodes(op="output")
    for x, value in zip(data, runs[1].values(output.args[0][0]), strict=True):
        torch.testing.assert_close(value, model(x), rtol=0, atol=0)
