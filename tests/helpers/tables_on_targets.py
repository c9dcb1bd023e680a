"""A net with every kind of weight, palettized with every form of table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity
from graphopt.quantization import QuantizationScheme, QuantizationSpec

TARGETS = [
    pytest.param("coreai", marks=pytest.mark.coreai),
    pytest.param("coreml", marks=pytest.mark.coreml),
    "torch",
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 8, 3)  # "lut" is part of this name
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.embed = nn.Embedding(32, 8)
        self.fc = nn.Linear(4, 8)
        self.right = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = self.up(torch.relu(self.convolution(x)))
        return self.fc(y.mean((2, 3))) @ self.right + self.embed(ids).mean(1), y


# its own generator: whoever imports this first draws the same
_DRAWN = torch.Generator().manual_seed(0)
ARGS = (torch.randn(1, 4, 6, 6, generator=_DRAWN), torch.randint(0, 32, (1, 5), generator=_DRAWN))


GROUPS = PerGroupedChannelGranularity(group_size=4)


UINT8 = QuantizationSpec(dtype=torch.uint8, qscheme=QuantizationScheme.ASYMMETRIC)


SPECS = {
    **{f"{bits} bits": PalettizationSpec(n_bits=bits) for bits in (1, 2, 3, 4, 6, 8)},
    "groups": PalettizationSpec(granularity=GROUPS, n_bits=2),
    "groups on axis 1": PalettizationSpec(
        granularity=PerGroupedChannelGranularity(axis=1, group_size=4), n_bits=3
    ),
    "vectors": PalettizationSpec(cluster_dim=2),
    "vectors in groups": PalettizationSpec(cluster_dim=2, granularity=GROUPS),
    "int8 table": PalettizationSpec(lut_qspec=QuantizationSpec()),
    "uint8 tables in groups": PalettizationSpec(lut_qspec=UINT8, granularity=GROUPS, n_bits=3),
    "channel scale": PalettizationSpec(enable_per_channel_scale=True),
    "outliers": PalettizationSpec(outlier_fraction=0.05),
    "outliers, scales and int8 tables": PalettizationSpec(
        outlier_fraction=0.05, enable_per_channel_scale=True, lut_qspec=QuantizationSpec()
    ),
    "everything": PalettizationSpec(
        enable_per_channel_scale=True,
        lut_qspec=QuantizationSpec(),
        granularity=PerGroupedChannelGranularity(axis=1, group_size=4),
        cluster_dim=2,
    ),
}


def palettized(spec: PalettizationSpec) -> KMeansPalettizer:
    torch.manual_seed(0)
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )
    palettizer = KMeansPalettizer(Net().eval(), config)
    palettizer.prepare(ARGS)
    return palettizer
