"""A small net, its data, and a quantizer calibrated on them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.quantization import (
    QuantizationSpec,
    Quantizer,
    QuantizerConfig,
)

ACT = QuantizationSpec()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 4)
        for norm in (self.norm, self.norm2):
            nn.init.uniform_(norm.running_mean, -0.3, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        y = F.relu(y + self.norm2(self.conv2(y)))
        return self.fc(self.drop(F.max_pool2d(y, 2).mean((2, 3))))


# its own generator: whoever imports this first draws the same
_DRAWN = torch.Generator().manual_seed(0)
X = torch.randn(2, 3, 8, 8, generator=_DRAWN)


def calibrated(
    model: nn.Module, config: QuantizerConfig | None = None, inputs: tuple[Tensor, ...] = (X,)
) -> Quantizer:
    quantizer = Quantizer(model, config)
    quantizer.prepare(inputs)
    quantizer.calibrate([inputs])
    return quantizer
