"""Every architecture goes capture → palettize at 4 bits → target → run, and is compared.

No target refuses an uncompressed model of this list in the versions that the extras pin.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import zoo

import graphopt
from graphopt.palettization import KMeansPalettizer


@pytest.mark.coreai
@pytest.mark.parametrize("name", zoo.MODELS)
def test_runs_on_the_core_ai_runtime_as_in_pytorch(name: str, tmp_path: Path) -> None:
    model, args = zoo.MODELS[name]()
    palettizer = KMeansPalettizer(model)
    palettizer.prepare(args)
    finalized = palettizer.finalize(backend=graphopt.ExportBackend.CoreAI)
    artifact = graphopt.lower(finalized, graphopt.ExportBackend.CoreAI, args)
    artifact.save(tmp_path / "model.aimodel")
    outcome = artifact.verify(args)
    assert outcome.max_error < 1e-3
    assert outcome.weights == len(palettizer.summary().palettized) > 0


@pytest.mark.coreml
@pytest.mark.parametrize("name", ["resnet", "convnext", "bert", "llama", "centernet", "lstm"])
def test_core_ml_package_evaluates_as_pytorch(name: str, tmp_path: Path) -> None:
    model, args = zoo.MODELS[name]()
    palettizer = KMeansPalettizer(model)
    palettizer.prepare(args)
    artifact = graphopt.lower(
        palettizer.program(), graphopt.ExportBackend.CoreML, precision="float32"
    )
    artifact.save(tmp_path / "model.mlpackage")
    outcome = artifact.verify(args)
    assert outcome.complete
    assert outcome.max_error < 1e-5
    assert outcome.weights == len(palettizer.summary().palettized) > 0


@pytest.mark.coreml
@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.MODELS)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_core_ml_package_evaluates_as_pytorch_everywhere(
    name: str, precision: str, tmp_path: Path
) -> None:
    model, args = zoo.MODELS[name]()
    palettizer = KMeansPalettizer(model)
    palettizer.prepare(args)
    artifact = graphopt.lower(palettizer.program(), "coreml", precision=precision)
    artifact.save(tmp_path / "model.mlpackage")
    outcome = artifact.verify(args)
    assert outcome.complete
    assert outcome.max_error < (1e-5 if precision == "float32" else 1e-2)


@pytest.mark.parametrize("name", ["resnet", "bert", "lstm_bi2"])
def test_saved_program_loads_and_runs_in_pytorch(name: str, tmp_path: Path) -> None:
    model, args = zoo.MODELS[name]()
    palettizer = KMeansPalettizer(model)
    palettizer.prepare(args)
    artifact = graphopt.lower(palettizer.program(), "torch")
    artifact.save(tmp_path / "model.pt2")
    assert artifact.verify(args).max_error == 0.0
