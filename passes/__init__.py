"""Passes: each a small frozen object that rewrites a graph in one way."""

if __name__ != "graphopt.passes":
    raise ImportError("import graphopt.passes, not passes")

from typing import Any

from graphopt.audited import own_module
from graphopt.fitting.clustering import cluster_annotated
from graphopt.fitting.evidence import Resources
from graphopt.passes.absorb_channel_scale import AbsorbChannelScale
from graphopt.passes.annotate_palettization import AnnotatePalettization
from graphopt.passes.annotate_pruning import AnnotatePruning
from graphopt.passes.annotate_quantization import AnnotateQuantization
from graphopt.passes.calibrate_activations import CalibrateActivations
from graphopt.passes.convert_quantization import ConvertQuantization
from graphopt.passes.correct_bias import CorrectBias
from graphopt.passes.correct_statistics import (
    CorrectStatistics,
    ForgetReference,
    KeepReference,
    reference_of,
)
from graphopt.passes.dequantize_to_shift_scale import DequantizeToShiftScale
from graphopt.passes.dequantize_weights import DecodeWeights, DequantizeWeights
from graphopt.passes.detect_sparsity import DetectSparsity
from graphopt.passes.expand_range_rounding import ExpandRangeRounding
from graphopt.passes.expand_sparse import ExpandSparse
from graphopt.passes.expand_tables import ExpandTables
from graphopt.passes.fake_palettize import FakePalettize
from graphopt.passes.fit_integers import FitIntegers
from graphopt.passes.fit_palettes import FitPalettes
from graphopt.passes.fold_batchnorm import FoldBatchNorm
from graphopt.passes.fold_computed_weights import FoldComputedWeights
from graphopt.passes.fold_padding import FoldPadding
from graphopt.passes.insert_fake_quantize import InsertFakeQuantize
from graphopt.passes.insert_palettizers import InsertPalettizers
from graphopt.passes.insert_pruners import InsertPruners
from graphopt.passes.insert_taps import InsertTaps
from graphopt.passes.integers_to_tables import IntegersToTables
from graphopt.passes.load_state import LoadState
from graphopt.passes.migrate_scales import MigrateScales
from graphopt.passes.palettize_weights import PalettizeWeights
from graphopt.passes.prune_weights import PruneWeights
from graphopt.passes.quantize_caches import QuantizeCaches
from graphopt.passes.reestimate_batchnorm import ReestimateBatchNorm
from graphopt.passes.remove_unused import RemoveUnused
from graphopt.passes.restore_training import RestoreTraining
from graphopt.passes.tables_to_integers import TablesToIntegers
from graphopt.passes.tune import Tune
from graphopt.passes.widen_scales import WidenScales

__all__ = [
    "AbsorbChannelScale",
    "AnnotatePalettization",
    "AnnotatePruning",
    "AnnotateQuantization",
    "CalibrateActivations",
    "ConvertQuantization",
    "CorrectBias",
    "CorrectStatistics",
    "DecodeWeights",
    "DequantizeToShiftScale",
    "DequantizeWeights",
    "DetectSparsity",
    "ExpandRangeRounding",
    "ExpandSparse",
    "ExpandTables",
    "FakePalettize",
    "FitIntegers",
    "FitPalettes",
    "FoldBatchNorm",
    "FoldComputedWeights",
    "FoldPadding",
    "ForgetReference",
    "InsertFakeQuantize",
    "InsertPalettizers",
    "InsertPruners",
    "InsertTaps",
    "IntegersToTables",
    "KeepReference",
    "LoadState",
    "MigrateScales",
    "PalettizeWeights",
    "PruneWeights",
    "QuantizeCaches",
    "RaiseToVocabulary",
    "ReestimateBatchNorm",
    "RemoveUnused",
    "Resources",
    "RestoreTraining",
    "TablesToIntegers",
    "Tune",
    "WidenScales",
    "cluster_annotated",
    "reference_of",
]

# stands above the passes, with the targets that it asks
_ELSEWHERE = {"RaiseToVocabulary": "graphopt.backends.raising"}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(own_module(_ELSEWHERE[name]), name)
