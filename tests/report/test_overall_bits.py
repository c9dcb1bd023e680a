"""Headline figures count everything that a program stores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.inspection import bits_per_weight
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
)
from graphopt.quantization import QuantizerConfig

IDS = torch.tensor([[1, 2, 3]])


class Net(nn.Module):
    """A table of tokens that is large beside the layer, a norm and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 16)
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.norm(self.words(ids)))


def without_the_embedding() -> KMeansPalettizerConfig:
    return KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(), module_name_configs={"words": None}
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "tables": KMeansPalettizerConfig,
    "the embedding left alone": without_the_embedding,
    "integers": QuantizerConfig.presets.w8,
    "activations": QuantizerConfig.presets.w8a8,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_bits_over_all_are_those_of_every_stored_tensor(name: str) -> None:
    program = graphopt.compress(Net().eval(), (IDS,), CONFIGS[name](), [(IDS,)])
    table, counted = program.report(), bits_per_weight(program)
    assert table.overall_bits_per_weight == pytest.approx(counted.bpw, rel=1e-6)
    assert table.stored_bytes == pytest.approx(counted.total_bits / 8, abs=len(table) + 1)


def test_a_large_tensor_that_stays_shows_in_the_headline() -> None:
    palettizer = KMeansPalettizer(Net().eval(), without_the_embedding())
    palettizer.prepare((IDS,))
    table = palettizer.summary()
    stored = 32 * (100 * 16 + 2 * 16 + 8) + 4 * 128 + 16 * 32
    elements = 100 * 16 + 2 * 16 + 8 + 128
    assert table.overall_bits_per_weight == pytest.approx(stored / elements)
    assert table.bits_per_weight == pytest.approx((4 * 128 + 16 * 32) / 128)
    first = str(table).splitlines()[0]
    assert f"{stored / elements:.3f} bits per weight" in first
    assert "8.000 over the compressed" in first
