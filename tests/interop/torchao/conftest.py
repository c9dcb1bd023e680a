"""A net whose norms have seen data, and data for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(scope="module")
def net() -> nn.Module:
    from helpers.torchao_nets import Net

    torch.manual_seed(0)
    model = Net().train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(8, 3, 8, 8))
    return model.eval()


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(4)]
