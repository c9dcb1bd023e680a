"""A small net and its compressed forms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphopt.inspection import (
    OpInfo,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) + x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.second = Block()
        self.head = nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def names(found: tuple[OpInfo, ...]) -> list[str]:
    return [op.op_name for op in found]
