"""Views and paddings in simpler ops, against torch's own."""

from __future__ import annotations

import pytest
import torch

from graphopt.backends.decompositions.views import pad_in_turn


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("pad", [(-1, 2, 1, -1), (2, -1, -2, 1), (1, 1, -1, -1)])
def test_paddings_may_cut_on_one_side_and_repeat_on_the_other(
    mode: str, pad: tuple[int, ...]
) -> None:
    x = torch.arange(60.0).reshape(1, 3, 4, 5)
    want = torch.nn.functional.pad(x, pad, mode)
    assert torch.equal(pad_in_turn(x, pad, mode), want)
