"""A net with every op that has a weight, and palettes of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)


class EveryOp(nn.Module):
    """One weight for each kind of op that holds weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.conv3 = nn.Conv3d(1, 4, 3, padding=1)
        self.same = nn.Conv2d(16, 16, 3, padding="same")
        self.up2 = nn.ConvTranspose2d(16, 8, 2, 2)
        self.up1 = nn.ConvTranspose1d(8, 4, 2)
        self.fc = nn.Linear(8, 12)
        self.right = nn.Parameter(torch.randn(12, 8))
        self.turned = nn.Parameter(torch.randn(8, 8))
        self.batched = nn.Parameter(torch.randn(2, 8, 8))
        self.bias = nn.Parameter(torch.randn(8))
        self.add = nn.Parameter(torch.randn(8, 8))
        self.embed = nn.Embedding(32, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.gru = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        z = self.conv2(self.conv1(x).unsqueeze(2).expand(-1, -1, 4, -1))
        z = self.up2(self.same(z))
        q = self.up1(z.mean(2))
        w = self.conv3(q.unsqueeze(1).unsqueeze(1)).mean((1, 2))
        h = self.fc(z.mean((2, 3))) @ self.right
        h = F.linear(h, self.turned.t())
        h = torch.addmm(self.bias, h, self.add)
        h = torch.bmm(torch.stack([h, h]), self.batched).sum(0)
        e = self.embed(ids)
        a, _ = self.attention(e, e, e)
        a = self.gru(self.lstm(a)[0])[0]
        return h + a.mean(1), w


# its own generator: whoever imports this first draws the same
_DRAWN = torch.Generator().manual_seed(0)
ARGS = (torch.randn(1, 4, 16, generator=_DRAWN), torch.randint(0, 32, (1, 5), generator=_DRAWN))


def uniform(spec: PalettizationSpec) -> KMeansPalettizerConfig:
    return KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )


def small(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4)).eval()


X = (torch.randn(2, 6, generator=_DRAWN),)
