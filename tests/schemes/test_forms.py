"""Which form of tables a tensor carries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import ConfigError
from graphopt.palettization import KMeansPalettizerConfig, PalettizationSpec
from graphopt.schemes.forms import NO_VECTORS, Held, chosen_form
from graphopt.schemes.layout import plan_layout
from graphopt.schemes.palettize import Palettization, palettize
from graphopt.specs import PerGroupedChannelGranularity
from graphopt.specs.storage import StorageRules

PRESETS: Any = KMeansPalettizerConfig.presets
RATES = {"w4_vectors": 4, "w3_vectors": 3, "w2_vectors": 2}


def spec_of(name: str) -> PalettizationSpec:
    config = getattr(PRESETS, name)()
    spec = config.global_config.op_state_spec["weight"]
    assert isinstance(spec, PalettizationSpec)
    return spec


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("w4_vectors", (384, 384), (8, 2, None)),
        ("w4_vectors", (64, 64), (4, 1, None)),
        ("w3_vectors", (384, 384), (6, 2, None)),
        ("w2_vectors", (384, 384), (8, 4, None)),
        ("w2_vectors", (30522, 384), (8, 4, 1)),
        ("w2_vectors", (128, 128), (4, 2, None)),
        ("w2_vectors", (1001, 1003), (2, 1, None)),
        ("w4_vectors", (1001, 384, 3, 3), (8, 2, 1)),
    ],
)
def test_entries_are_as_long_as_the_tensor_carries(
    name: str, shape: tuple[int, ...], expected: tuple[int, int, int | None]
) -> None:
    form = chosen_form(spec_of(name), shape, 0)
    assert (form.n_bits, form.cluster_dim, form.cluster_axis) == expected
    assert form.n_bits == RATES[name] * form.cluster_dim
    assert form.max_table_share is None
    plan_layout(shape, 0, form)


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("shape", [(384, 384), (4096, 4096), (30522, 384), (96, 40)])
def test_tables_cost_no_more_than_their_share(name: str, shape: tuple[int, int]) -> None:
    spec = spec_of(name)
    parts = Palettization().parts(spec, shape, 0, StorageRules())
    assert parts.bits() <= RATES[name] * shape[0] * shape[1] * 1.125


def test_large_tensors_get_several_tables() -> None:
    form = chosen_form(spec_of("w4_vectors"), (4096, 4096), 0)
    assert isinstance(form.granularity, PerGroupedChannelGranularity)
    assert 4096 % form.granularity.group_size == 0
    alone = chosen_form(spec_of("w4_vectors"), (4096, 4096), 0, Held(groups=False))
    assert alone.granularity.type == "per_tensor"


def test_targets_without_vectors_get_scalars_at_the_same_rate() -> None:
    for name, rate in RATES.items():
        form = chosen_form(spec_of(name), (384, 384), 0, Held(vectors=False))
        assert (form.n_bits, form.cluster_dim) == (rate, 1)


def test_other_specs_stay_as_they_are() -> None:
    spec = PalettizationSpec(n_bits=8, cluster_dim=2)
    assert chosen_form(spec, (3, 5), 0) is spec


def test_entries_along_an_axis_are_consecutive_there() -> None:
    weight = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(0))
    spec = PalettizationSpec(n_bits=2, cluster_dim=4, cluster_axis=1)
    made = palettize(weight, spec)
    dense, table = made.dense(), made.table_values().reshape(-1, 4)
    for row in range(6):
        for place in range(3):
            for start in (0, 4):
                entry = dense[row, start : start + 4, place]
                assert bool((table == entry).all(1).any())
    with pytest.raises(graphopt.errors.CompressionError, match="cluster_axis=3"):
        plan_layout((6, 8, 3), 0, spec.model_copy(update={"cluster_axis": 3}))


class Net(nn.Module):
    """An odd number of outputs, so that vectors lie along the inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 501), nn.Linear(501, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


@pytest.fixture(scope="module")
def net() -> graphopt.Program:
    return graphopt.capture(Net().eval(), (torch.randn(2, 64),))


def rows_of(program: graphopt.Program, **options: Any) -> list[Any]:
    made = graphopt.compress(program, None, PRESETS.w2_vectors(), **options)
    return list(made.report())


def test_report_says_where_a_target_has_no_vectors(net: graphopt.Program) -> None:
    assert [row.n_bits for row in rows_of(net)] == [4, 4]
    for options in (
        {"backend": "executorch"},
        {"backend": "coreml", "lowering": {"minimum_deployment_target": "iOS17"}},
    ):
        rows = rows_of(net, **options)
        assert [row.n_bits for row in rows] == [2, 2]
        assert all(NO_VECTORS in row.note for row in rows)
    assert [row.n_bits for row in rows_of(net, backend="coreml")] == [4, 4]
    assert not any(row.note for row in rows_of(net, backend="coreml"))


def test_feedback_reaches_vectors_along_either_axis(net: graphopt.Program) -> None:
    torch.manual_seed(1)
    mixing = torch.randn(64, 64) * torch.linspace(0.05, 2, 64)
    data = [torch.randn(128, 64) @ mixing for _ in range(2)]
    test = torch.randn(128, 64) @ mixing
    with torch.no_grad():
        wanted = net.module()(test)
    errors = []
    for given in (None, data):
        made = graphopt.compress(net, None, PRESETS.w2_vectors(), given)
        assert not made.report().warnings
        with torch.no_grad():
            errors.append(float((made.module()(test) - wanted).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_the_share_is_a_share() -> None:
    with pytest.raises(ConfigError):
        PalettizationSpec(max_table_share=0.0)
