"""One scale for each output channel of transposed convolutions in groups, which have them on two axes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.quantization import QuantizerConfig


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize(
    ("groups", "inputs", "outputs", "scales"),
    [(1, 4, 6, 6), (2, 4, 6, 6), (4, 4, 4, 4), (4, 8, 8, 8)],
)
def test_small_channel_keeps_a_scale_of_its_own(
    ndim: int, groups: int, inputs: int, outputs: int, scales: int
) -> None:
    torch.manual_seed(0)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d)[ndim - 1]
    model = kind(inputs, outputs, 3, groups=groups, bias=False).eval()
    gains = 10 ** torch.linspace(-2, 1, outputs).reshape(groups, 1, -1, *[1] * ndim)
    weight = model.weight.data
    weight.view(groups, inputs // groups, outputs // groups, *weight.shape[2:]).mul_(gains)
    x = torch.randn(2, inputs, *[5] * ndim)
    made = graphopt.compress(model, (x,), QuantizerConfig.presets.w8())
    (row,) = made.report().rows
    assert f"{scales} scales" in row.detail
    axes = (0, *range(2, x.ndim))
    got, want = made.module()(x), model(x)
    assert ((got - want).abs().amax(axes) / want.abs().amax(axes)).max() < 0.02
