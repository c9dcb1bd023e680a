"""FoldComputedWeights: weights behind arithmetic on constants are stored, and then compressed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import graphopt
from graphopt.analysis.weights import find_weights
from graphopt.mixed_precision import analyze
from graphopt.passes import FoldComputedWeights
from graphopt.quantization import QuantizerConfig

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 16))
        self.g = nn.Parameter(torch.rand(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w * self.g)


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 32)
        self.a, self.b = nn.Parameter(torch.randn(32, 2)), nn.Parameter(torch.randn(2, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight + self.a @ self.b, self.fc.bias)


class Cell(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell = kind(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x)
        return h[0] if isinstance(h, tuple) else h


class Tied(nn.Module):
    """An embedding whose scaled weight is the head's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.embed(ids), self.embed.weight * 0.25)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w * torch.bernoulli(torch.full_like(self.w, 0.5)))


# model, name that its weight gets
NETS = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(16, 32)), "weight"),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.Linear(16, 32)), "weight"),
    "norm of a convolution": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 16)), parametrizations.weight_norm(nn.Conv1d(1, 8, 3))
        ),
        "1.weight",
    ),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(16, 32)), "weight"),
    "gain": (Scaled, "w"),
    "low rank": (LowRank, "fc.weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("form", ["tables", "W8A8"])
def test_computed_weight_is_compressed_under_the_models_name(name: str, form: str) -> None:
    torch.manual_seed(0)
    build, weight = NETS[name]
    model = build().eval()
    config = None if form == "tables" else QuantizerConfig()
    made = graphopt.compress(model, (X,), config, calibration_data=[X])
    (row,) = (row for row in made.report().rows if row.status != "skipped")
    assert row.name == weight
    got, want = made.module()(X), model(X)
    assert float((got - want).norm() / want.norm()) < (0.15 if form == "tables" else 0.03)


@pytest.mark.parametrize("name", ["gain", "low rank"])
def test_folding_changes_no_output_and_no_tensor_of_the_model(name: str) -> None:
    model = NETS[name][0]().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gm = graphopt.capture(model, (X,)).copy().graph_module
    assert FoldComputedWeights()(gm).modified
    assert not FoldComputedWeights()(gm).modified
    torch.testing.assert_close(gm(X), model(X))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert isinstance(gm.get_parameter(NETS[name][1]), nn.Parameter)


def test_weight_that_has_other_readers_is_not_stored_twice() -> None:
    ids = torch.arange(6)[None]
    gm = graphopt.capture(Tied().eval(), (ids,)).copy().graph_module
    assert not FoldComputedWeights()(gm).modified


def test_random_weight_is_not_frozen() -> None:
    gm = graphopt.capture(Noisy().eval(), (X,)).copy().graph_module
    assert not FoldComputedWeights()(gm).modified


def test_compressed_weight_is_not_decoded_again() -> None:
    gm = graphopt.compress(nn.Linear(16, 32), (X,)).module()
    assert not FoldComputedWeights()(gm).modified


def test_search_and_compression_agree_on_names() -> None:
    table = analyze(LowRank().eval(), (X,), [4, 8], [X])
    assert list(table.values()) == ["fc.weight"]
    made = graphopt.compress(LowRank().eval(), (X,), table.recipe(target_bpw=6).to_config())
    assert [row.name for row in made.report().rows if row.status == "palettized"] == ["fc.weight"]


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_weights_of_recurrent_cells_are_found(kind: type[nn.Module]) -> None:
    model = Cell(kind).eval()
    program = graphopt.capture(model, (X,))
    names = [weight.name for weight in find_weights(program.graph_module) if weight.uses]
    assert {"cell.weight_ih", "cell.weight_hh"} <= set(names)
    torch.testing.assert_close(program.graph_module(X), model(X))
    made = graphopt.compress(model, (X,))
    assert {row.name for row in made.report().rows if row.status == "palettized"} == {
        "cell.weight_ih",
        "cell.weight_hh",
    }
