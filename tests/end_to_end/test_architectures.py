"""Every architecture goes capture → palettize at 4 bits → target → run, and is compared.

No target refuses an uncompressed model of this list in the versions that the extras pin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import zoo
from helpers.tiers import cases

import graphopt
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.palettization import KMeansPalettizer
from graphopt.quantization import Quantizer

# one network of convolutions, one of attention, one that recurs
FEW = {"edsr", "lstm"}


@pytest.mark.slow
@pytest.mark.coreai
@pytest.mark.parametrize("name", cases(zoo.MODELS, default=lambda name: name in FEW))
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


@pytest.mark.slow
@pytest.mark.coreml
@pytest.mark.parametrize(
    "name",
    cases(
        ["resnet", "convnext", "bert", "llama", "centernet", "lstm"],
        default=lambda name: name in {"convnext", "bert", "lstm"},
    ),
)
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


def quantized(name: str) -> tuple[CompressedProgram, tuple[Any, ...]]:
    """int8 weights and activations, rounded where XNNPACK rounds."""
    model, args = zoo.MODELS[name]()
    quantizer = Quantizer(model)
    quantizer.prepare(args, backend="executorch")
    quantizer.calibrate([args])
    return quantizer.program(), args


def check_pte(program: CompressedProgram, tmp_path: Path, **options: Any) -> float:
    artifact = graphopt.lower(program, "executorch", **options)
    artifact.save(tmp_path / "model.pte", overwrite=True)
    return artifact.verification.max_error


def check_every_pte(name: str, tmp_path: Path) -> None:
    # XNNPACK requantizes in integers: a step of the last scale, and what it grows to in between
    assert check_pte(quantized(name)[0], tmp_path) < 0.1
    model, args = zoo.MODELS[name]()
    palettizer = KMeansPalettizer(model)
    palettizer.prepare(args)
    program = palettizer.program()
    assert check_pte(program, tmp_path) < 1e-5
    assert check_pte(program, tmp_path, delegate="portable", tables="compressed") < 1e-5
    assert check_pte(program, tmp_path, delegate="coreml", precision="float32") < 1e-5
    assert check_pte(program, tmp_path, delegate="coreai") < 1e-5


@pytest.mark.slow
@pytest.mark.executorch
@pytest.mark.coreml
@pytest.mark.coreai
@pytest.mark.parametrize("name", ["edsr"])
def test_executorch_programs_run_as_pytorch(name: str, tmp_path: Path) -> None:
    check_every_pte(name, tmp_path)


@pytest.mark.executorch
@pytest.mark.coreml
@pytest.mark.coreai
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(zoo.MODELS) - {"edsr"}))
def test_executorch_programs_run_as_pytorch_everywhere(name: str, tmp_path: Path) -> None:
    check_every_pte(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", cases(["resnet", "bert", "lstm_bi2"], default=lambda name: name != "resnet")
)
def test_saved_program_loads_and_runs_in_pytorch(name: str, tmp_path: Path) -> None:
    model, args = zoo.MODELS[name]()
    palettizer = KMeansPalettizer(model)
    palettizer.prepare(args)
    artifact = graphopt.lower(palettizer.program(), "torch")
    artifact.save(tmp_path / "model.pt2")
    assert artifact.verify(args).max_error == 0.0
