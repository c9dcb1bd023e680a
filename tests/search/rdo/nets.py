"""A small trained network and its data, for the optimisation as a whole."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DigitNet(nn.Module):
    """A residual network for 8×8 digits: a branch with norms, a downsample, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.conv1 = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(24)
        self.side = nn.Conv2d(12, 24, 1, stride=2)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)) + self.side(x))
        return self.head(x.mean((2, 3)))


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(
        found.target
    )


@cache
def trained() -> DigitNet:
    """Trained for a few seconds on the images that calibration and evaluation do not use."""
    torch.manual_seed(0)
    model = DigitNet()
    x, y = digits()
    x, y = x[600:], y[600:]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(4):
        for part in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return model.eval()


def calibration(count: int = 256, batch: int = 32) -> list[Tensor]:
    return list(digits()[0][:count].split(batch))


def held_out() -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[300:600], y[300:600]
