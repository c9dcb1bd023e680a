"""A small CNN on scikit-learn's digits: 8×8 images, trained in seconds with a fixed seed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

Split = tuple[Tensor, Tensor]


class DigitsNet(nn.Module):
    """Three convolutions with batch norm and two linear layers, about 64 k parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.hidden = nn.Linear(64 * 2 * 2, 32)
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)
        return self.out(F.relu(self.hidden(x)))


def load() -> tuple[Split, Split]:
    """(train, test), every fourth digit held out; images [n, 1, 8, 8] in 0 … 1."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    held_out = torch.arange(len(labels)) % 4 == 0
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def train(data: Split, *, epochs: int = 12, seed: int = 0) -> DigitsNet:
    """Train with Adam; the model comes back in evaluation mode."""
    torch.manual_seed(seed)
    model = DigitsNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images, labels = data
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, data: Split) -> float:
    """Fraction of digits that the model names."""
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).float().mean())
