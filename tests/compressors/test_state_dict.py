"""`prepare(state_dict=…)` goes on where another prepared module stood."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import InputError
from graphopt.palettization import (
    DKMPalettizer,
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
)
from graphopt.pruning import MagnitudePruner, MagnitudePrunerConfig, ModuleMagnitudePrunerConfig
from graphopt.pruning.config import PolynomialDecaySchedule
from graphopt.quantization import (
    ModuleQuantizerConfig,
    QuantizationSpec,
    Quantizer,
    QuantizerConfig,
)
from graphopt.specs import PalettizationSpec, PerChannelGranularity, PerGroupedChannelGranularity

SPECS = {
    "one table": PalettizationSpec(),
    "groups": PalettizationSpec(granularity=PerGroupedChannelGranularity(axis=0, group_size=4)),
    "int8 entries": PalettizationSpec(lut_qspec=QuantizationSpec()),
    "vectors": PalettizationSpec(cluster_dim=2),
}


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def _config(spec: PalettizationSpec) -> KMeansPalettizerConfig:
    module = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    return KMeansPalettizerConfig(global_config=module)


@pytest.mark.parametrize("name", SPECS)
def test_tables_are_those_of_the_state(name: str, x: Tensor) -> None:
    first = KMeansPalettizer(_model(0), _config(SPECS[name]))
    state = first.prepare((x,)).state_dict()
    second = KMeansPalettizer(_model(1), _config(SPECS[name]))
    prepared = second.prepare((x,), state_dict=state)
    torch.testing.assert_close(prepared(x), first.finalize(backend="torch")(x))
    torch.testing.assert_close(second.finalize(backend="torch")(x), prepared(x))


def test_scales_of_channels_come_back_nearly(x: Tensor) -> None:
    spec = PalettizationSpec(enable_per_channel_scale=True)
    first = KMeansPalettizer(_model(0), _config(spec))
    want = first.prepare((x,))
    prepared = KMeansPalettizer(_model(1), _config(spec)).prepare(
        (x,), state_dict=want.state_dict()
    )
    assert (prepared(x) - want(x)).abs().max() < 1e-2 * want(x).abs().max()


@pytest.mark.parametrize("kind", [KMeansPalettizer, DKMPalettizer])
def test_trained_palettes_go_on(kind: type[KMeansPalettizer], x: Tensor) -> None:
    first = kind(_model(0))
    first.prepare((x,))
    with first.training_mode() as trained:
        optimizer = torch.optim.SGD(trained.parameters(), 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            trained(x).square().sum().backward()
            optimizer.step()
    again = kind(_model(1)).prepare((x,), state_dict=trained.state_dict())
    torch.testing.assert_close(again(x), trained(x))


def test_ranges_are_those_of_the_state(x: Tensor) -> None:
    nearest = QuantizationSpec(granularity=PerChannelGranularity(), algorithm="nearest")
    module = ModuleQuantizerConfig(op_state_spec={"weight": nearest})
    config = QuantizerConfig(global_config=module)
    first = Quantizer(_model(0), config)
    prepared = first.prepare((x,))
    first.calibrate([x])
    second = Quantizer(_model(1), config)
    again = second.prepare((x,), state_dict=prepared.state_dict())
    assert torch.equal(again(x), prepared(x))
    assert torch.equal(second.finalize(backend="torch")(x), first.finalize(backend="torch")(x))


@pytest.mark.parametrize("qscheme", ["symmetric", "asymmetric"])
def test_weights_fitted_by_error_feedback_are_those_of_the_state(qscheme: str, x: Tensor) -> None:
    spec = QuantizationSpec(
        dtype=torch.int4,
        qscheme=qscheme,
        granularity=PerChannelGranularity(),
        algorithm="gptq",
    )
    module = ModuleQuantizerConfig(op_state_spec={"weight": spec})
    config = QuantizerConfig(global_config=module, migrate_scales=False)
    first = Quantizer(_model(0), config)
    prepared = first.prepare((x,))
    first.calibrate([x])
    buffer = io.BytesIO()
    torch.save(prepared.state_dict(), buffer)
    buffer.seek(0)
    second = Quantizer(_model(1), config)
    again = second.prepare((x,), state_dict=torch.load(buffer, weights_only=True))
    assert torch.equal(again(x), prepared(x))
    assert torch.equal(second.finalize(backend="torch")(x), first.finalize(backend="torch")(x))
    third = Quantizer(_model(1), config)
    without = {name: value for name, value in again.state_dict().items() if ".held_" not in name}
    assert not torch.equal(third.prepare((x,), state_dict=without)(x), prepared(x))


def test_a_schedule_goes_on_at_its_step(x: Tensor) -> None:
    schedule = PolynomialDecaySchedule(total_iters=10)
    module = ModuleMagnitudePrunerConfig(sparsity_schedule=schedule)
    config = MagnitudePrunerConfig(global_config=module)
    first = MagnitudePruner(_model(0), config)
    prepared = first.prepare((x,))
    for _ in range(5):
        first.step()
    state = {name: value.clone() for name, value in prepared.state_dict().items()}
    second = MagnitudePruner(_model(1), config)
    again = second.prepare((x,), state_dict=state)
    assert torch.equal(again(x), prepared(x))
    for _ in range(3):
        first.step()
        second.step()
    zeros = [int((m(x) == 0).sum()) for m in (prepared, again)]
    assert torch.equal(again(x), prepared(x)), zeros


@pytest.mark.parametrize("kind", [KMeansPalettizer, Quantizer, MagnitudePruner])
@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_another_state_is_refused(kind: Any, change: str, x: Tensor) -> None:
    state = dict(kind(_model(0)).prepare((x,)).state_dict())
    if change == "missing":
        del state["0.weight"]
    elif change == "unknown":
        state["3.weight"] = torch.zeros(2)
    else:
        state["0.weight"] = torch.zeros(2, 2)
    with pytest.raises(InputError, match="state_dict does not fit"):
        kind(_model(0)).prepare((x,), state_dict=state)
