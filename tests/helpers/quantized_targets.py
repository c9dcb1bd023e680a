"""Targets that run quantized programs, and lowered artifacts."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from torch import Tensor, nn

import graphopt
from graphopt.backends.base import Artifact
from graphopt.quantization import (
    Quantizer,
)

EXECUTED = [
    pytest.param("coreai", marks=pytest.mark.coreai),
    pytest.param("coreml", marks=pytest.mark.coreml),
    pytest.param("executorch", marks=pytest.mark.executorch),
]


def saved(program: object, target: str, folder: Path) -> Artifact:
    options = {"precision": "float32"} if target in ("coreai", "coreml") else {}
    artifact = graphopt.lower(program, target, **options)  # type: ignore[arg-type]
    artifact.save(folder / f"net{artifact.suffix}")
    return artifact


@cache
def digits() -> tuple[nn.Module, tuple[Tensor, Tensor], Tensor]:
    """A CNN trained for seconds, its held-out images and labels, and calibration images."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[2] / "examples/digits"))
    from model import load, train  # type: ignore[import-not-found]

    train_data, test_data = load()
    return train(train_data, epochs=3), test_data, train_data[0][:256]


@cache
def quantized_digits() -> Quantizer:
    model, _, images = digits()
    quantizer = Quantizer(model)
    quantizer.prepare((images[:2],))
    quantizer.calibrate(images.split(64))
    return quantizer
