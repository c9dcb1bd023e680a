"""Which sizes stay open where a batch of 1 stands at another axis, and where a size must be 1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import InputError


class Stateful(nn.Module):
    """A recurrent layer whose state comes from outside."""

    def __init__(self, layers: int, batch_first: bool) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 6, layers, batch_first=batch_first)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.layer(x, (h, c))
        return y, h, c


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("batch_first", [True, False])
def test_batch_of_hidden_states_is_their_second_axis(layers: int, batch_first: bool) -> None:
    model = Stateful(layers, batch_first).eval()

    def call(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        shape = (batch, 4, 6) if batch_first else (4, batch, 6)
        state = torch.randn(2, layers, batch, 6)
        return torch.randn(shape), state[0], state[1]

    program = graphopt.capture(model, call(1))
    for batch in (1, 3):
        example = call(batch)
        for value, expected in zip(program.module()(*example), model(*example), strict=True):
            torch.testing.assert_close(value, expected)
    x, h, c = call(3)
    with pytest.raises(InputError, match=rf"size\(\)\[0\] == {layers}"):
        program.module()(x, torch.cat([h, h]), torch.cat([c, c]))


def test_size_that_must_be_1_is_a_number() -> None:
    program = graphopt.capture(
        Stateful(1, True).eval(), (torch.randn(3, 4, 6), *torch.randn(2, 1, 3, 6))
    )
    fixed = program.provenance.static_dims
    assert {"h[0] = 1", "c[0] = 1"} <= set(fixed)
    assert not any(place.startswith("x[0]") for place in fixed)
