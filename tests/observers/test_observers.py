"""The contract of every observer, and what each of them computes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from graphopt.errors import ConfigError
from graphopt.observers import (
    OBSERVERS,
    EntropyObserver,
    GlobalMinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
    observer_of,
)
from graphopt.quantization import QuantizationScheme, QuantizationSpec

AFFINE = QuantizationSpec(qscheme=QuantizationScheme.ASYMMETRIC)
SPECS = {"symmetric": QuantizationSpec(), "affine": AFFINE}


def seen(
    observer: Observer, batches: list[Tensor], spec: QuantizationSpec
) -> tuple[Tensor, Tensor]:
    state = observer.init(batches[0].shape[0])
    for batch in batches:
        state = observer.update(state, batch)
    return observer.range(state, spec)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("kind", OBSERVERS, ids=lambda kind: kind.name)
class TestContract:
    def test_range_does_not_depend_on_the_order(
        self, kind: type[Observer], spec: QuantizationSpec
    ) -> None:
        batches = [torch.randn(2, 500) * scale for scale in (0.01, 3.0, 1.0, 40.0, 0.5)]
        forward = seen(kind(), batches, spec)
        backward = seen(kind(), batches[::-1], spec)
        same = all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
        assert same != kind.order_matters

    def test_nothing_seen_gives_no_range(
        self, kind: type[Observer], spec: QuantizationSpec
    ) -> None:
        observer = kind()
        state = observer.update(observer.init(3), torch.empty(3, 0))
        low, high = observer.range(state, spec)
        assert low.shape == high.shape == (3,)
        assert low.isnan().all()
        assert high.isnan().all()

    @pytest.mark.parametrize("value", [0.0, 2.5, -7.0, 1e-20])
    def test_constants_are_covered(
        self, kind: type[Observer], spec: QuantizationSpec, value: float
    ) -> None:
        low, high = seen(kind(), [torch.full((1, 100), value)], spec)
        assert torch.isfinite(low).all()
        assert torch.isfinite(high).all()
        assert float(torch.maximum(-low, high)) == pytest.approx(abs(value), rel=0.05, abs=1e-30)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_nan_and_inf_are_seen_in_the_range(
        self, kind: type[Observer], spec: QuantizationSpec, bad: float
    ) -> None:
        values = torch.randn(2, 50)
        values[0, 7] = bad
        low, high = seen(kind(), [values], spec)
        assert not torch.isfinite(low[0])
        assert not torch.isfinite(high[0])
        assert torch.isfinite(low[1])
        assert torch.isfinite(high[1])

    def test_states_are_constant_in_size_and_left_alone(
        self, kind: type[Observer], spec: QuantizationSpec
    ) -> None:
        observer = kind()
        first = observer.init(2)
        copies = {key: value.clone() for key, value in first.items()}
        later = observer.update(first, torch.randn(2, 1000))
        assert {k: v.shape for k, v in later.items()} == {k: v.shape for k, v in first.items()}
        for key, value in copies.items():
            torch.testing.assert_close(first[key], value, rtol=0, atol=0, equal_nan=True)

    def test_a_group_does_not_see_another(
        self, kind: type[Observer], spec: QuantizationSpec
    ) -> None:
        values = torch.randn(3, 400) * torch.tensor([[1.0], [10.0], [100.0]])
        together = seen(kind(), [values], spec)
        for group in range(3):
            alone = seen(kind(), [values[group : group + 1]], spec)
            torch.testing.assert_close(together[0][group], alone[0][0])
            torch.testing.assert_close(together[1][group], alone[1][0])


def test_moving_average_rises_at_once_and_falls_slowly() -> None:
    batches = [
        torch.tensor([[-1.0, 1.0]]),
        torch.tensor([[-3.0, 5.0]]),
        torch.tensor([[-1.0, 1.0]]),
    ]
    low, high = seen(MovingAverageObserver(rate=0.1), batches, AFFINE)
    assert float(high) == pytest.approx(0.9 * 5 + 0.1 * 1)
    assert float(low) == pytest.approx(-(0.9 * 3 + 0.1 * 1))


def test_moving_average_forgets_old_ranges() -> None:
    batches = [torch.tensor([[-50.0, 50.0]])] + [torch.tensor([[-1.0, 1.0]])] * 1000
    _, high = seen(MovingAverageObserver(), batches, AFFINE)
    assert float(high) == pytest.approx(1.0, rel=0.01)


def test_global_minmax_is_numpys() -> None:
    batches = [torch.randn(1, 100) for _ in range(5)]
    low, high = seen(GlobalMinMaxObserver(), batches, AFFINE)
    values = torch.cat(batches).numpy()
    assert float(low) == values.min()
    assert float(high) == values.max()


def test_percentile_is_numpys_within_a_bin() -> None:
    values = torch.randn(1, 200_000)
    low, high = seen(PercentileObserver(share=0.99), [values], AFFINE)
    bin_width = 2.0 ** math.ceil(math.log2(float(values.abs().max()))) / 2048
    want = np.quantile(values.numpy(), [0.005, 0.995])
    assert float(low) == pytest.approx(want[0], abs=2 * bin_width)
    assert float(high) == pytest.approx(want[1], abs=2 * bin_width)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_mse_range_is_near_the_best_of_a_brute_search(spec: QuantizationSpec, bits: str) -> None:
    spec = QuantizationSpec(dtype=bits, qscheme=spec.qscheme)
    values = torch.cat([torch.randn(1, 20_000), torch.tensor([[9.0, -6.0]])], dim=1)
    low, high = seen(MSEObserver(), [values], spec)

    def error(a: float, b: float) -> float:
        """Rounding written out in numpy, independently of the library."""
        x = values.numpy().astype(np.float64)
        lowest, highest = (-8, 7) if bits == "int4" else (-128, 127)
        if spec.qscheme is QuantizationScheme.ASYMMETRIC:
            scale = (b - a) / (highest - lowest)
            zero = round(lowest - a / scale)
        else:
            scale, zero = max(-a / -lowest, b / highest), 0
        q = np.clip(np.round(x / scale) + zero, lowest, highest)
        return float(((q - zero) * scale - x).__pow__(2).sum())

    candidates = [
        error(-6.0 * i, 9.0 * j)
        for i in np.linspace(0.2, 1, 41)
        for j in (np.linspace(0.2, 1, 41) if spec is AFFINE or "asym" in spec.qscheme else [i])
    ]
    assert error(float(low), float(high)) <= 1.03 * min(candidates)


def test_dead_and_tiny_activations_take_no_time_and_no_nan() -> None:
    for scale in (1e-30, 1e-20, 0.0):
        low, high = seen(MSEObserver(), [torch.randn(1, 1000) * scale], AFFINE)
        assert torch.isfinite(low).all()
        assert torch.isfinite(high).all()


def test_observer_of_a_spec_takes_names_and_classes() -> None:
    class Tight(PercentileObserver):
        pass

    assert isinstance(observer_of(QuantizationSpec()), MovingAverageObserver)
    assert isinstance(observer_of(QuantizationSpec(qparam_calculator_cls=Tight)), Tight)
    with pytest.raises(ConfigError, match="no subclass of Observer"):
        observer_of(QuantizationSpec(qparam_calculator_cls=dict))


def test_names_of_classes_round_trip() -> None:
    spec = QuantizationSpec(qparam_calculator_cls=PercentileObserver)
    assert QuantizationSpec(**spec.model_dump(mode="json")) == spec


def test_every_observer_has_a_name_that_specs_accept() -> None:
    from typing import get_args

    from graphopt.specs.quantization import QParamCalculator

    names = [kind.name for kind in OBSERVERS]
    assert len(set(names)) == len(names)
    assert set(get_args(QParamCalculator)) == {*names, "default", "dynamic"}
    for kind in OBSERVERS:
        assert type(observer_of(QuantizationSpec(qparam_calculator_cls=kind.name))) is kind


def _divergence(values: Tensor, low: float, high: float, levels: int) -> float:
    """`Σ P log(P / Q)` of a range, bin by bin."""
    edge = 2.0 ** int(torch.frexp(values.abs().max())[1])
    counts = torch.histc(values, 8192, -edge, edge).double()
    centres = (torch.arange(8192) - 4095.5) / 4096 * edge
    inside = (centres >= low) & (centres <= high)
    places = torch.nonzero(inside).flatten()
    clipped = counts * inside
    clipped[places[0]] += counts[centres < low].sum()
    clipped[places[-1]] += counts[centres > high].sum()
    width = torch.tensor(high - low, dtype=torch.float32) / levels
    level = ((centres - low) / width).long().clamp(0, levels - 1)
    shared = torch.zeros_like(counts)
    for number in range(levels):
        own = inside & (level == number) & (counts > 0)
        shared[own] = counts[own].sum() / max(int(own.sum()), 1)
    p, q = clipped / clipped.sum(), shared / shared.sum()
    return float((p * torch.log(p / q.clamp(min=1e-12)))[p > 0].sum())


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("kind", ["normal", "relu", "heavy", "few", "one side"])
def test_entropy_range_diverges_least_of_all_shares(kind: str, scheme: str) -> None:
    draws = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    values = {
        "normal": draws,
        "relu": draws.relu(),
        "heavy": draws**5,
        "few": draws[:, :6],
        "one side": -draws.abs() - 1,
    }[kind]
    spec = QuantizationSpec(dtype="int4", qscheme=scheme)
    observer = EntropyObserver()
    low, high = observer.range(observer.update(observer.init(1), values), spec)
    ends = values.min().clamp(max=0), values.max().clamp(min=0)
    if scheme == "symmetric":
        ends = -values.abs().max(), values.abs().max()
    tried = [
        _divergence(values, float(ends[0] * ratio), float(ends[1] * ratio), 16)
        for ratio in torch.tensor([1 - 0.01 * step for step in range(80)])
    ]
    assert _divergence(values, float(low), float(high), 16) <= min(tried) + 1e-9
