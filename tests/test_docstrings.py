"""Docstrings of the public names: there is one, with an example, and the example runs.

Examples are run with `torch`, `graphopt`, the name itself, a small `model` of two linear layers, its
`example` and calibration `batches` at hand, as `examples/guide/api.md` says.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt

PACKAGES = (
    *("graphopt", "graphopt.backends", "graphopt.casting", "graphopt.common", "graphopt.config"),
    *("graphopt.coreai_utils", "graphopt.coreml_utils", "graphopt.errors", "graphopt.inspection"),
    *("graphopt.ir.op_info", "graphopt.mixed_precision", "graphopt.observers", "graphopt.ops"),
    *("graphopt.palettization", "graphopt.palettization.config", "graphopt.palettization.spec"),
    *("graphopt.passes", "graphopt.pipelines", "graphopt.pruning", "graphopt.pruning.config"),
    *("graphopt.pruning.spec", "graphopt.quantization", "graphopt.quantization.config"),
    *("graphopt.quantization.spec", "graphopt.rdo", "graphopt.specs", "graphopt.torchao"),
)
# what has no example yet, by package: names leave this list, none is added to it
WITHOUT_EXAMPLE: dict[str, str] = {
    "graphopt": "FitResult Workers capture lower tune",
    "graphopt.backends": "Artifact Backend load_backend",
    "graphopt.casting": "cast_int32_to_int16",
    "graphopt.config": (
        "CompressionConfig ModuleCompressionConfig OpCompressionConfig "
        "WeightOnlyModuleValidationMixin WeightOnlyOpValidationMixin"
    ),
    "graphopt.coreai_utils": "CompressionGranularity DType QScheme quantize_weights sparsify_weights",
    "graphopt.coreml_utils": "WeightInfo quantize_weights weights_of",
    "graphopt.inspection": (
        "BitsPerWeightResult BoundaryEdge Difference InputEdge LayerDifference ModelReport "
        "ModelSummary ModuleContext ModuleInfo ModuleRow OpInfo SourceFrame bits_per_weight "
        "diff inspect_program save_graph write_page"
    ),
    "graphopt.ir.op_info": (
        "Activation BatchNormArguments BiasSlot ConvolutionArguments NormArguments OpInfo "
        "Registration Scales View WeightSlot argument cast_type eps_of info_of is_batch_norm "
        "is_cast is_training known_ops momentum_of named noise_range op_names targets view_of "
        "without_memory_order"
    ),
    "graphopt.mixed_precision": "Point Recipe SensitivityTable Sweep solve_greedily solve_near",
    "graphopt.observers": (
        "EntropyObserver LpObserver MSEObserver PercentileObserver QParamsCalculatorBase "
        "RunningRangeMixin observer_of"
    ),
    "graphopt.palettization": "FitPalettes",
    "graphopt.passes": (
        "AbsorbChannelScale AnnotatePruning AnnotateQuantization ConvertQuantization "
        "CorrectBias CorrectStatistics DecodeWeights DequantizeToShiftScale DetectSparsity "
        "ExpandRangeRounding ExpandSparse ExpandTables FakePalettize FitIntegers "
        "FoldComputedWeights ForgetReference InsertFakeQuantize InsertPalettizers InsertPruners InsertTaps "
        "IntegersToTables KeepReference LoadState MigrateScales PruneWeights QuantizeCaches "
        "RaiseToVocabulary ReestimateBatchNorm RestoreTraining TablesToIntegers Tune "
        "WidenScales cluster_annotated reference_of"
    ),
    "graphopt.pipelines": "PassRecord PassReport rdo",
    "graphopt.quantization": "CalibrateActivations",
    "graphopt.quantization.spec": (
        "DynamicQParamsCalculator GlobalMinMaxQParamsCalculator "
        "MovingAverageQParamsCalculator StatefulQParamsCalculatorBase "
        "StatelessQParamsCalculatorBase StaticQParamsCalculator fp4_forward"
    ),
    "graphopt.rdo": (
        "Allocation BlockFit BlockReport Comparison Costs LayerReport OptimizeRateDistortion "
        "Optimized RDOReport compare draw_comparison uniform_program"
    ),
    "graphopt.specs": "DKMTrainingSpec STETrainingSpec",
    "graphopt.torchao": "AnnotateFromTorchao",
}


def public() -> Iterator[tuple[str, str, Any]]:
    """(package, name, object) of every public class and function, once."""
    seen: set[int] = set()
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and id(value) not in seen:
                seen.add(id(value))
                yield package, name, value


def has_example(value: Any) -> bool:
    return ">>>" in (inspect.getdoc(value) or "")


def examples() -> list[Any]:
    """What is run; with its markers where that goes through a toolchain."""
    integration = {
        "graphopt.coreai_utils": (pytest.mark.integration, pytest.mark.coreai),
        "graphopt.coreml_utils": (pytest.mark.integration, pytest.mark.coreml),
        "graphopt.torchao": (pytest.mark.integration, pytest.mark.executorch),
        "graphopt.rdo": (pytest.mark.integration,),
    }
    return [
        pytest.param(package, name, value, marks=marks, id=f"{package}.{name}")
        for package, name, value in public()
        if has_example(value)
        for marks in [integration.get(package, ())]
    ]


def test_every_public_name_is_documented() -> None:
    assert [f"{package}.{name}" for package, name, value in public() if not value.__doc__] == []


def test_every_public_name_has_an_example_or_waits_for_one() -> None:
    without: dict[str, set[str]] = {}
    for package, name, value in public():
        if not has_example(value):
            without.setdefault(package, set()).add(name)
    waiting = {package: set(names.split()) for package, names in WITHOUT_EXAMPLE.items()}
    assert without == waiting


@pytest.fixture(scope="module")
def at_hand() -> dict[str, Any]:
    """What every example may use."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    batches = [torch.randn(8, 16) for _ in range(2)]
    return {
        "torch": torch,
        "graphopt": graphopt,
        "model": model,
        "example": (torch.randn(1, 16),),
        "batches": batches,
    }


@pytest.mark.parametrize(("package", "name", "value"), examples())
def test_example_runs(
    package: str,
    name: str,
    value: Any,
    at_hand: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(value) or ""
    example = doctest.DocTestParser().get_doctest(
        text, {**at_hand, name: value}, f"{package}.{name}", None, None
    )
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)
