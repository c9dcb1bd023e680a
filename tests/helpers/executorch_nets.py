"""Small nets, every form of table, and .pte files of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from graphopt import pipelines
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity
from graphopt.specs import QuantizationSpec


def grouped(axis: int, size: int) -> PerGroupedChannelGranularity:
    return PerGroupedChannelGranularity(axis=axis, group_size=size)


SPECS = {
    "1 bit": PalettizationSpec(n_bits=1),
    "2 bits": PalettizationSpec(n_bits=2),
    "3 bits": PalettizationSpec(n_bits=3),
    "4 bits": PalettizationSpec(n_bits=4),
    "6 bits": PalettizationSpec(n_bits=6),
    "8 bits": PalettizationSpec(n_bits=8),
    "groups of rows": PalettizationSpec(granularity=grouped(0, 2)),
    "3 bits in groups": PalettizationSpec(n_bits=3, granularity=grouped(0, 4)),
    "groups of columns": PalettizationSpec(granularity=grouped(1, 4)),
    "vectors": PalettizationSpec(cluster_dim=2),
    "vectors in groups": PalettizationSpec(n_bits=2, cluster_dim=2, granularity=grouped(1, 4)),
    "channel scale": PalettizationSpec(enable_per_channel_scale=True),
    "int8 table": PalettizationSpec(lut_qspec=QuantizationSpec()),
    "int8 tables": PalettizationSpec(lut_qspec=QuantizationSpec(), granularity=grouped(0, 4)),
    "outliers": PalettizationSpec(outlier_fraction=0.02),
}


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


class Words(nn.Module):
    """An embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(128, 32)
        self.head = nn.Linear(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


IDS = torch.randint(0, 128, (2, 7), generator=torch.Generator().manual_seed(0))


def palettized(model: nn.Module, example: Tensor, spec: PalettizationSpec) -> CompressedProgram:
    inside = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    config = KMeansPalettizerConfig(global_config=inside)
    return pipelines.palettize(config).run(model.eval(), (example,))


def saved(program: CompressedProgram, path: Path, **options: Any) -> Any:
    artifact = graphopt.lower(program, "executorch", **options)
    artifact.save(path / "model.pte")
    return artifact
