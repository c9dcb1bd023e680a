"""Every order of two compressors, each with a pass over the other's result, runs on targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.palettization import KMeansPalettizer
from graphopt.pruning import MagnitudePruner
from graphopt.quantization import Quantizer

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
COMPRESSORS: dict[str, Callable[[nn.Module], Any]] = {
    "pruned": MagnitudePruner,
    "palettized": KMeansPalettizer,
    "quantized": Quantizer,
}
SUFFIXES = {"coreai": ".aimodel", "torch": ".pt2"}


def compressed(model: nn.Module, name: str, target: str) -> nn.Module:
    compressor = COMPRESSORS[name](model)
    compressor.prepare((X,))
    if name == "quantized":
        compressor.calibrate([X])
    made: nn.Module = compressor.finalize(backend=graphopt.ExportBackend(target))
    return made


@pytest.mark.integration
@pytest.mark.parametrize(
    "target",
    [
        pytest.param("coreai", marks=pytest.mark.coreai),
        "torch",
    ],
)
@pytest.mark.parametrize("second", COMPRESSORS)
@pytest.mark.parametrize("first", COMPRESSORS)
def test_two_compressors_in_any_order_run(
    first: str, second: str, target: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    made = compressed(compressed(model, first, target), second, target)
    artifact = graphopt.lower(made, target, (X,))
    artifact.save(tmp_path / f"model{SUFFIXES[target]}")
    assert artifact.verification is not None
    assert artifact.verification.complete
    error = float((made(X) - model(X)).norm() / model(X).norm())
    # half of the weights are gone where one pruned
    assert error < (0.8 if "pruned" in (first, second) else 0.15)
