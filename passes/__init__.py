"""Passes: each a small frozen object that rewrites a graph in one way."""

if __name__ != "graphopt.passes":
    raise ImportError("import graphopt.passes, not passes")

from graphopt.passes.annotate_palettization import AnnotatePalettization
from graphopt.passes.fake_palettize import FakePalettize
from graphopt.passes.fold_batchnorm import FoldBatchNorm
from graphopt.passes.palettize_weights import PalettizeWeights, cluster_annotated
from graphopt.passes.raise_to_vocabulary import RaiseToVocabulary
from graphopt.passes.remove_unused import RemoveUnused

__all__ = [
    "AnnotatePalettization",
    "FakePalettize",
    "FoldBatchNorm",
    "PalettizeWeights",
    "RaiseToVocabulary",
    "RemoveUnused",
    "cluster_annotated",
]
