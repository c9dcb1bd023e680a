"""Buffers that a model writes: data run through it, and it stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.palettized_nets import uniform
from helpers.tiers import cases
from torch import Tensor, nn

import graphopt
from graphopt import rdo
from graphopt.ir.state import state_of
from graphopt.mixed_precision import analyze
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.quantization import Quantizer, QuantizerConfig

DATA = list(torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(0)))


class Counter(nn.Module):
    """Counts its calls, and the count is part of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.fc(x) + self.calls


class Cache(nn.Module):
    """Writes each call into the next row of a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.register_buffer("rows", torch.zeros(8, 16))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.rows.index_copy_(0, self.place, self.fc(x)[:1])
        self.place.add_(1)
        return self.fc(self.rows + x[:1])


class Average(nn.Module):
    """Subtracts a running mean, a part of which it sets."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.mean(0) * 0.1)
        y = self.fc(x - self.mean)
        self.mean[:4] = 1
        return y + self.mean


def palettes(algorithm: Any) -> KMeansPalettizerConfig:
    return uniform(PalettizationSpec(n_bits=4, algorithm=algorithm))


def compressing(config: Any, **options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: graphopt.compress(
        model, (DATA[0],), config, calibration_data=DATA, **options
    ).module()


def by_class(compressor: Any) -> nn.Module:
    compressor.prepare((DATA[0],))
    compressor.calibrate(DATA)
    with compressor.calibration_mode() as seen:
        for x in DATA:
            output = compressor._prepared(x)
            if seen is not compressor._prepared:
                seen.step(output)
    module: nn.Module = compressor.finalize()
    return module


def analyzed(model: nn.Module) -> nn.Module:
    for mode in ("exact", "fast"):
        analyze(model, (DATA[0],), [4], DATA, mode=mode)
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "kmeans": compressing(palettes("kmeans")),
    "skm": compressing(palettes("skm")),
    "gptq": compressing(palettes("gptq")),
    "tuned": compressing(palettes("kmeans"), tune_steps=2),
    "W8A8": compressing(QuantizerConfig()),
    "palettizer": lambda model: by_class(KMeansPalettizer(model, palettes("skm"))),
    "quantizer": lambda model: by_class(Quantizer(model)),
    "analyze": analyzed,
    "rdo": lambda model: rdo.optimize(
        model, (DATA[0],), DATA, {"target_bits": 12}
    ).program.module(),
}
NETS = [Counter, Cache, Average]


def test_state_is_what_the_graph_writes() -> None:
    gm = graphopt.capture(Cache().eval(), (DATA[0],)).graph_module
    assert sorted(state_of(gm)) == ["place", "rows"]


# searches and tuning are the slow ones
QUICK = ("kmeans", "skm", "gptq", "W8A8", "quantizer")


@pytest.mark.parametrize(
    ("net", "way"), cases(NETS, WAYS, default=lambda net, way: way in QUICK or net is Cache)
)
def test_state_is_neither_the_users_nor_kept(way: str, net: type[nn.Module]) -> None:
    model = net().eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    made = dict(WAYS[way](model).named_buffers())
    for name, value in before.items():
        assert torch.equal(model.get_buffer(name), value)
        assert torch.equal(made[name], value)


def test_every_batch_starts_from_the_initial_state() -> None:
    torch.manual_seed(0)
    model = Counter().eval()
    quantizer = Quantizer(model)
    quantizer.prepare((DATA[0],))
    quantizer.calibrate([DATA[0]])
    once = [part.scale for part in quantizer.summary().activations if part.scale is not None]
    again = Quantizer(model)
    again.prepare((DATA[0],))
    again.calibrate([DATA[0]] * 5)
    assert [p.scale for p in again.summary().activations if p.scale is not None] == once
    assert once


def test_inputs_that_a_model_writes_stay_the_callers() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x.add_(1)
            return self.fc(x)

    x = DATA[0].clone()
    for config in (palettes("gptq"), QuantizerConfig()):
        graphopt.compress(Writes().eval(), (x,), config, calibration_data=[x])
        assert torch.equal(x, DATA[0])
