"""Moments of channels, against torch's own statistics; biases that take up a change."""

from __future__ import annotations

import pytest
import torch

from graphopt.fitting.channel_moments import ChannelMoments, moved_bias


@pytest.mark.parametrize(("shape", "axis"), [((6, 5), -1), ((4, 5, 3, 2), 1), ((7, 3, 5), 2)])
def test_moments_of_batches_are_those_of_all_data(shape: tuple[int, ...], axis: int) -> None:
    generator = torch.Generator().manual_seed(0)
    data = 1000 + torch.randn(3, *shape, generator=generator)  # far from 0
    moments = ChannelMoments.of(data, axis)
    rows = torch.cat([batch.double().movedim(axis, 0).flatten(1) for batch in data], 1)
    torch.testing.assert_close(moments.mean, rows.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.variance, rows.var(1, correction=0), rtol=1e-9, atol=0)


def test_constant_channels_have_no_variance() -> None:
    moments = ChannelMoments.of([torch.full((8, 2), 3.1)], 1)
    assert moments.variance.tolist() == [0.0, 0.0]


def test_bias_takes_up_a_change_in_its_own_type() -> None:
    bias = torch.tensor([1.0, -2.0], dtype=torch.float16)
    moved = moved_bias(bias, torch.tensor([0.5, 0.25], dtype=torch.float64))
    assert moved.dtype is torch.float16
    assert moved.tolist() == [1.5, -1.75]
