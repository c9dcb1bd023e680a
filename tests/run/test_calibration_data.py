"""Calibration data: what is taken, and what is refused before it reaches a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.palettized_nets import uniform
from helpers.tiers import cases
from torch import Tensor, nn

import graphopt
from graphopt import rdo
from graphopt.errors import InputError
from graphopt.mixed_precision import analyze
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.quantization import Quantizer, QuantizerConfig

X = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def palettes(algorithm: Any) -> KMeansPalettizerConfig:
    return uniform(PalettizationSpec(n_bits=4, algorithm=algorithm))


def compressing(config: Any) -> Callable[[Any], object]:
    return lambda data: graphopt.compress(net(), (X,), config, calibration_data=data)


def by_palettizer(data: Any) -> object:
    palettizer = KMeansPalettizer(net(), palettes("skm"))
    palettizer.prepare((X,))
    return palettizer.calibrate(data, progress=False)


def by_quantizer(data: Any) -> object:
    quantizer = Quantizer(net())
    quantizer.prepare((X,))
    return quantizer.calibrate(data)


def in_calibration_mode(data: Any) -> object:
    quantizer = Quantizer(net())
    prepared = quantizer.prepare((X,))
    with quantizer.calibration_mode():
        return [prepared(x) for x in data]


COMPRESS: dict[str, Callable[[Any], object]] = {
    "kmeans": compressing(palettes("kmeans")),
    "skm": compressing(palettes("skm")),
    "gptq": compressing(palettes("gptq")),
    "W8A8": compressing(QuantizerConfig()),
}
WAYS: dict[str, Callable[[Any], object]] = {
    **COMPRESS,
    "palettizer": by_palettizer,
    "quantizer": by_quantizer,
    "analyze": lambda data: analyze(net(), (X,), [4], data),
    "rdo": lambda data: rdo.optimize(net(), (X,), data, {"target_bits": 9}),
}


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("way", "bad"),
    cases(
        (*WAYS, "calibration mode"),
        (NAN, INF, -INF),
        default=lambda way, bad: bad != bad or way in ("kmeans", "quantizer"),
    ),
)
def test_batch_that_is_not_finite_is_named(way: str, bad: float) -> None:
    damaged = X.clone()
    damaged[3, 2] = bad
    run = in_calibration_mode if way == "calibration mode" else WAYS[way]
    with pytest.raises(InputError, match=r"\[1\]: input 'input' holds NaN or Inf \(1 of 512"):
        run([X, damaged])


def test_mask_of_minus_infinity_is_taken() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y = self.fc(x)
            return F.scaled_dot_product_attention(y, y, y, mask)

    x, mask = torch.randn(2, 5, 16), torch.zeros(5, 5)
    mask[:, 3:] = -float("inf")
    config = palettes("gptq")
    made = graphopt.compress(Masked().eval(), (x, mask), config, calibration_data=[(x, mask)])
    assert made.module()(x, mask).isfinite().all()


@pytest.mark.parametrize("way", [name for name in WAYS if name != "palettizer"])
def test_empty_data_are_refused(way: str) -> None:
    with pytest.raises(InputError, match="there are no data"):
        WAYS[way]([])


@pytest.mark.parametrize("way", WAYS)
def test_one_tensor_for_a_list_of_calls_is_refused(way: str) -> None:
    with pytest.raises(InputError, match="one batch x is"):
        WAYS[way](X)


@pytest.mark.parametrize("way", WAYS)
def test_pairs_without_a_loss_are_refused_with_what_to_pass(way: str) -> None:
    with pytest.raises(InputError, match=r"\[0\].*takes \['input'\].*\[x for x, label in data\]"):
        WAYS[way]([(X, torch.zeros(32))])


def test_inputs_alone_with_a_loss_are_refused() -> None:
    with pytest.raises(InputError, match=r"pair \(inputs, target\), got a Tensor"):
        graphopt.compress(net(), (X,), palettes("skm"), [X], F.mse_loss)


@pytest.mark.parametrize("way", COMPRESS)
@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.numpy(),
        lambda x: x.double(),
        lambda x: x.numpy().astype(np.float64),
        lambda x: {"input": x.numpy()},
        lambda x: (x.numpy(),),
        lambda x: ((x,), {}),
        lambda x: ((), {"input": x}),
    ],
    ids=["array", "double", "double array", "named array", "tuple", "args and kwargs", "kwargs"],
)
def test_arrays_and_other_float_types_are_the_same_data(
    way: str, form: Callable[[Tensor], Any]
) -> None:
    want, made = COMPRESS[way]([X]), COMPRESS[way]([form(X)])
    assert torch.equal(made.module()(X), want.module()(X))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("given", "kind"), [("a.png", "a str"), (None, "a NoneType")])
def test_what_is_no_tensor_is_refused_by_name(given: object, kind: str) -> None:
    quantizer = Quantizer(net())
    quantizer.prepare((X,))
    with pytest.raises(InputError, match=rf"data \[1\]: input 'input' is {kind}"):
        quantizer.calibrate([(X,), (given,)])


def test_integers_for_floats_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"\[0\]: input 'input' is torch.uint8.*torch.float32"):
        COMPRESS["W8A8"]([X.to(torch.uint8)])


@pytest.mark.parametrize("way", [*COMPRESS, "analyze", "rdo"])
def test_weight_that_is_not_finite_is_named(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    model[2].weight.data[0, 0] = float("nan")  # type: ignore[index,union-attr]
    monkeypatch.setattr(f"{__name__}.net", lambda: model)
    with pytest.raises(graphopt.errors.CompressionError, match=r"2\.weight: .*NaN or Inf"):
        WAYS[way]([X])
