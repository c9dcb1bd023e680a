from __future__ import annotations

import importlib

import pytest

import graphopt

# names that coreai-opt documents, under graphopt's own root
COREAI_OPT_NAMES = {
    "palettization": [
        *("KMeansPalettizer", "KMeansPalettizerConfig", "ModuleKMeansPalettizerConfig"),
        "PalettizationSpec",
    ],
    "palettization.config": [
        *("KMeansPalettizerConfig", "ModuleKMeansPalettizerConfig", "OpKMeansPalettizerConfig"),
        "PATSchedule",
    ],
    "palettization.spec": [
        *("DefaultTrainingSpec", "PalettizationGranularity", "PalettizationSpec"),
        *("PerGroupedChannelGranularity", "PerTensorGranularity", "TrainingStrategySpec"),
        "default_weight_palettization_spec",
    ],
    "quantization": [
        *("ExecutionMode", "ModuleQuantizerConfig", "QuantizationSpec", "QuantizerConfig"),
    ],
    "quantization.config": [
        *("ExecutionMode", "KVCacheQuantConfig", "ModuleQuantizerConfig", "OpQuantizerConfig"),
        *("QATSchedule", "QuantizerConfig"),
    ],
    "quantization.spec": [
        *("PerBlockGranularity", "PerChannelGranularity", "PerTensorGranularity"),
        *("QuantizationFormulation", "QuantizationScheme", "QuantizationSpec"),
        *("default_activation_quantization_spec", "default_weight_quantization_spec"),
    ],
    "pruning": ["MagnitudePrunerConfig", "ModuleMagnitudePrunerConfig", "PruningSpec"],
    "casting": ["cast_fp32_to_fp16", "cast_int32_to_int16", "cast_to_16_bit_precision"],
}


@pytest.mark.parametrize("module", COREAI_OPT_NAMES)
def test_documented_names_are_public(module: str) -> None:
    found = importlib.import_module(f"graphopt.{module}")
    assert set(COREAI_OPT_NAMES[module]) <= set(found.__all__)
    for name in found.__all__:
        assert hasattr(found, name)


def test_root_names_exist_and_are_documented() -> None:
    for name in graphopt.__all__:
        value = getattr(graphopt, name)
        assert name.startswith("__") or value.__doc__


def test_targets_have_their_names() -> None:
    names = {target.name for target in graphopt.ExportBackend}
    assert names == {"CoreAI", "CoreML", "ExecuTorch", "ONNX", "Torch"}


def test_name_that_left_its_moved_module_is_found_under_the_old_one() -> None:
    old = importlib.import_module("graphopt.program")
    with pytest.warns(DeprecationWarning, match="moved to graphopt.compressors.compressed_program"):
        assert old.CompressedProgram is graphopt.CompressedProgram
    with pytest.warns(DeprecationWarning, match="moved to graphopt.ir.program"):
        assert old.Program is graphopt.Program
