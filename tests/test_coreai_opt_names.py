"""coreai-opt 0.4.0's public names are found at the same paths below `graphopt`."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

# module below the package → its public names
NAMES: dict[str, str] = {
    "": (
        "CoreMLExportError DependencyVersionWarning ExportBackend "
        "TorchaoTorchIncompatibilityWarning UntestedTorchVersionWarning __version__"
    ),
    "casting": "cast_fp32_to_fp16 cast_int32_to_int16 cast_to_16_bit_precision",
    "casting.casting": "cast_fp32_to_fp16 cast_int32_to_int16 cast_to_16_bit_precision",
    "common": (
        "CompressionType CoreMLExportError DependencyVersionWarning ExportBackend "
        "TorchaoTorchIncompatibilityWarning UntestedTorchVersionWarning"
    ),
    "config": (
        "CompressionConfig CompressionSpec CompressionType ModuleCompressionConfig "
        "OpCompressionConfig WeightOnlyModuleValidationMixin WeightOnlyOpValidationMixin"
    ),
    "config.compression_config": (
        "CompressionConfig ModuleCompressionConfig OpCompressionConfig "
        "WeightOnlyModuleValidationMixin WeightOnlyOpValidationMixin"
    ),
    "config.spec": (
        "CompressionComponentFactoryBase CompressionSimulatorBase CompressionSpec "
        "CompressionTargetTensor CompressionType"
    ),
    "config.spec.base": "CompressionSpec",
    "config.spec.compression_simulator": "CompressionSimulatorBase",
    "config.spec.factory": "CompressionComponentFactoryBase CompressionTargetTensor",
    "coreai_utils": (
        "CompressionGranularity DType QScheme palettize_weights quantize_weights sparsify_weights"
    ),
    "coreai_utils.common": "CompressionGranularity DType QScheme",
    "coreai_utils.passes.weight_palettization": "palettize_weights",
    "coreai_utils.passes.weight_quantization": "quantize_weights",
    "coreai_utils.passes.weight_sparsification": "sparsify_weights",
    "inspection": (
        "BitsPerWeightResult BoundaryEdge InputEdge ModelInspector ModelSummary ModuleContext "
        "ModuleInfo OpInfo SourceFrame bits_per_weight"
    ),
    "inspection.bits_per_weight": "BitsPerWeightResult bits_per_weight",
    "inspection.model_inspector": "ModelInspector",
    "inspection.types": (
        "BoundaryEdge InputEdge ModelSummary ModuleContext ModuleInfo OpInfo SourceFrame"
    ),
    "palettization": (
        "KMeansPalettizer KMeansPalettizerConfig ModuleKMeansPalettizerConfig PalettizationSpec"
    ),
    "palettization.config": (
        "KMeansPalettizerConfig ModuleKMeansPalettizerConfig OpKMeansPalettizerConfig "
        "PATSchedule VectorKMeansConfig"
    ),
    "palettization.config.palettization_config": (
        "KMeansPalettizerConfig ModuleKMeansPalettizerConfig OpKMeansPalettizerConfig "
        "PATSchedule VectorKMeansConfig"
    ),
    "palettization.kmeans": "KMeansPalettizer",
    "palettization.kmeans.palettizer": "KMeansPalettizer",
    "palettization.spec": (
        "DefaultTrainingSpec PalettizationGranularity PalettizationSpec "
        "PerGroupedChannelGranularity PerTensorGranularity TrainingStrategy "
        "TrainingStrategySpec default_weight_palettization_spec"
    ),
    "palettization.spec.granularity": (
        "PalettizationGranularity PerGroupedChannelGranularity PerTensorGranularity"
    ),
    "palettization.spec.spec": "PalettizationSpec default_weight_palettization_spec",
    "palettization.spec.training_strategy": (
        "DefaultTrainingSpec TrainingStrategy TrainingStrategySpec"
    ),
    "pruning": "MagnitudePruner MagnitudePrunerConfig ModuleMagnitudePrunerConfig PruningSpec",
    "pruning.config": (
        "ConstantSparsitySchedule MagnitudePrunerConfig ModuleMagnitudePrunerConfig "
        "OpMagnitudePrunerConfig PolynomialDecaySchedule SparsityScheduleBase"
    ),
    "pruning.config.magnitude_pruner_config": (
        "MagnitudePrunerConfig ModuleMagnitudePrunerConfig OpMagnitudePrunerConfig"
    ),
    "pruning.config.sparsity_schedule": (
        "ConstantSparsitySchedule PolynomialDecaySchedule SparsityScheduleBase"
    ),
    "pruning.magnitude_pruner": "MagnitudePruner",
    "pruning.spec": (
        "ChannelStructured PruneImplBase PruningScheme PruningSpec Unstructured "
        "default_weight_pruning_spec"
    ),
    "pruning.spec.prune": "PruneImplBase",
    "pruning.spec.scheme": "ChannelStructured PruningScheme Unstructured",
    "pruning.spec.spec": "PruningSpec default_weight_pruning_spec",
    "quantization": (
        "ExecutionMode InvalidExecutionModeError ModuleQuantizerConfig QuantizationSpec "
        "Quantizer QuantizerConfig"
    ),
    "quantization.config": (
        "ExecutionMode InvalidExecutionModeError KVCacheQuantConfig ModuleQuantizerConfig "
        "OpQuantizerConfig QATSchedule QuantizerConfig"
    ),
    "quantization.config.quantization_config": (
        "ExecutionMode InvalidExecutionModeError KVCacheQuantConfig ModuleQuantizerConfig "
        "OpQuantizerConfig QATSchedule QuantizerConfig"
    ),
    "quantization.quantizer": "Quantizer",
    "quantization.spec": (
        "DynamicQParamsCalculator GlobalMinMaxQParamsCalculator MinMaxRangeCalculator "
        "MovingAverageQParamsCalculator PerBlockGranularity PerChannelGranularity "
        "PerTensorGranularity QParamsCalculatorBase QuantizationComponentFactory "
        "QuantizationFormulation QuantizationGranularity QuantizationScheme QuantizationSpec "
        "RangeCalculatorBase RunningRangeMixin StatefulQParamsCalculatorBase "
        "StatelessQParamsCalculatorBase StaticQParamsCalculator "
        "default_activation_quantization_spec default_weight_quantization_spec fp4_forward "
        "resolve_block_sizes"
    ),
    "quantization.spec.factory": "QuantizationComponentFactory",
    "quantization.spec.fake_quantize": "FakeQuantizeImplBase fp4_forward",
    "quantization.spec.granularity": (
        "PerBlockGranularity PerChannelGranularity PerTensorGranularity "
        "QuantizationGranularity resolve_block_sizes"
    ),
    "quantization.spec.qformulation": "QuantizationFormulation",
    "quantization.spec.qparams_calculator": (
        "DynamicQParamsCalculator GlobalMinMaxQParamsCalculator "
        "MovingAverageQParamsCalculator QParamsCalculatorBase RunningRangeMixin "
        "StatefulQParamsCalculatorBase StatelessQParamsCalculatorBase StaticQParamsCalculator"
    ),
    "quantization.spec.qscheme": "QuantizationScheme",
    "quantization.spec.range_calculator": "MinMaxRangeCalculator RangeCalculatorBase",
    "quantization.spec.spec": (
        "QuantizationSpec default_activation_quantization_spec default_weight_quantization_spec"
    ),
}
# parts of an engine that rewrites modules; the engine here rewrites graphs and has none of the kind
LEFT_OUT = {
    "CompressionComponentFactoryBase": "modules are not built from specs; passes read them",
    "CompressionSimulatorBase": "a prepared graph calls parts of its own, see `graphopt.prepared`",
    "FakeQuantizeImplBase": "`fake_quantize_cls` names 'default' or 'lsq'",
    "PruneImplBase": "`pruning_algo` takes a class with `compute_mask`",
    "QuantizationComponentFactory": "modules are not built from specs; passes read them",
    "TrainingStrategy": "`training_strategy_spec` names how palettes train",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_importable_at_their_paths(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        found = importlib.import_module(f"graphopt.{module}" if module else "graphopt")
        names = [name for name in NAMES[module].split() if name not in LEFT_OUT]
        missing = [name for name in names if not hasattr(found, name)]
    assert not missing


def test_few_names_are_left_out() -> None:
    assert len(LEFT_OUT) <= 6


def test_every_module_and_name_stands_on_the_page_for_those_who_move() -> None:
    page = Path(__file__).parent.parent / "examples" / "guide" / "from_coreai_opt.md"
    words = set(re.findall(r"`([\w.]+)`", page.read_text()))
    wanted = {name for names in NAMES.values() for name in names.split()} | set(NAMES) - {""}
    assert wanted - words == set()
    assert set(LEFT_OUT) <= words


def test_deep_modules_are_importable_first() -> None:
    code = (
        "from graphopt.quantization.spec.qscheme import QuantizationScheme\n"
        "from graphopt.palettization.kmeans.palettizer import KMeansPalettizer\n"
        "import graphopt.pruning.spec.scheme as scheme\n"
        "assert scheme.Unstructured().type == 'unstructured'"
    )
    subprocess.run(
        [sys.executable, "-W", "error:graphopt:DeprecationWarning", "-c", code], check=True
    )
