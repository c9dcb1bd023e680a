"""Ops that coreai-torch takes with fixed sizes alone, in programs whose sizes are open."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.state_nets import noise
from torch import Tensor, nn

import graphopt


class Prefill(nn.Module):
    """Attention of any number of rows to a cache, and how far it is filled."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(1, 2, 16, 4))
        self.register_buffer("filled", torch.tensor(0))

    def forward(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.rows.index_copy_(2, position, x)
        seen = torch.arange(16) <= position[:, None]
        self.filled.copy_(position[0] + x.shape[2])
        less = position[0] * x.shape[2] - x.shape[2]
        return (
            F.scaled_dot_product_attention(x, self.rows, self.rows, seen[None]),
            self.filled + 0,
            less,
        )


@pytest.mark.coreai
@pytest.mark.integration
def test_rows_masks_and_numbers_of_open_size_are_right(tmp_path: Path) -> None:
    program = graphopt.capture(Prefill(), (noise(1, 2, 5, 4), torch.arange(5)))
    artifact = graphopt.lower(program, "coreai", shapes={"x": {2: (2, 9)}})
    artifact.save(tmp_path / "m.aimodel")
    sizes = [
        (noise(1, 2, n, 4, seed=n), torch.arange(start, start + n))
        for n, start in ((9, 0), (3, 9), (2, 12))
    ]
    found = artifact.verify(calls=sizes)
    assert found.holds
    assert found.max_error < 1e-5
