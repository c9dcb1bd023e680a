"""Where channels lie behind averages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt.analysis.channel_flow import channel_axis_behind

CASES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor], int | None]] = {
    "axes stay": ((2, 4, 5, 6), lambda x: x.mean((2, 3), keepdim=True), 1),
    "axes behind go": ((2, 4, 5, 6), lambda x: x.mean((2, 3)), 1),
    "an axis before goes": ((2, 4, 4), lambda x: x.mean(0), 0),
    "counted from the end": ((2, 4, 4), lambda x: x.mean(-3), 0),
    "only channels are left": ((2, 4), lambda x: x.mean(0), 0),
    "channels are averaged": ((2, 4, 5), lambda x: x.mean(1), None),
    "a pool": ((2, 4, 6, 6), nn.AdaptiveAvgPool2d(2), 1),
}


class Average(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("case", CASES)
def test_channels_are_followed_through_averages(case: str) -> None:
    shape, function, expected = CASES[case]
    x = torch.randn(shape)
    gm = graphopt.capture(Average(function), (x,), dynamic_shapes=None).graph_module
    given = next(iter(gm.graph.find_nodes(op="placeholder")))
    user: fx.Node = next(iter(given.users))
    axis = channel_axis_behind(user, given, 1)
    assert axis == expected
    if axis is not None:
        # the definition: a factor per channel commutes with the op
        factors = torch.rand(shape[1]) + 0.5
        y = function(x)
        before = function(x * factors.reshape(-1, *[1] * (len(shape) - 2)))
        behind = y * factors.reshape([-1 if place == axis else 1 for place in range(y.ndim)])
        torch.testing.assert_close(before, behind)
