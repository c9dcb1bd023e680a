"""What every target must do with every form of a table that it can hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tables_on_targets import SPECS, TARGETS, palettized
from helpers.tiers import cases
from torch import Tensor, nn

import graphopt
from graphopt.backends import load_backend
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)

# in torch every form; Core AI and Core ML take turns, and both get what holds all at once
TURNS = {name: ("coreai", "coreml", "torch")[place % 3] for place, name in enumerate(SPECS)}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "target"),
    cases(
        SPECS,
        ("coreai", "coreml", "torch"),
        default=lambda name, target: TURNS[name] == target,
    ),
)
def test_every_form_of_table_is_executed_and_equal(name: str, target: str, tmp_path: Path) -> None:
    palettizer = palettized(SPECS[name])
    options = {"precision": "float32"} if target != "torch" else {}
    artifact = graphopt.lower(palettizer.program(), target, **options)
    artifact.save(tmp_path / f"net{artifact.suffix}")
    outcome = artifact.verification
    assert outcome.complete
    assert outcome.max_error < 1e-6
    assert outcome.weights == 5


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_size_follows_the_bits(target: str, tmp_path: Path) -> None:
    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(512, 512, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    x = (torch.randn(1, 512),)
    sizes = {}
    for bits in (1, 2, 3, 4, 6, 8):
        config = KMeansPalettizerConfig(
            global_config=ModuleKMeansPalettizerConfig(
                op_state_spec={"weight": PalettizationSpec(n_bits=bits)}
            )
        )
        palettizer = KMeansPalettizer(Big(), config)
        palettizer.prepare(x)
        artifact = graphopt.lower(palettizer.program(), target)
        artifact.save(tmp_path / f"{bits}{artifact.suffix}")
        sizes[bits] = artifact.size
    stored = load_backend(target).capabilities.stored_bits
    for bits, size in sizes.items():
        weight = 512 * 512 * (stored(bits) or 0) / 8 + 4 * 2 ** (stored(bits) or 0)
        # everything else (graph, metadata) is the same for all widths
        overhead = sizes[1] - (512 * 512 / 8 + 8)
        assert size == pytest.approx(weight + overhead, abs=3000)
