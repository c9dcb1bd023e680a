"""Decide for every candidate tensor what a pruning config makes of it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from typing_extensions import override

from graphopt.analysis.select_weights import (
    FLOAT_DTYPES,
    decide,
    report_unmatched,
    skipped_row,
    touch_modules,
)
from graphopt.analysis.weights import WeightTensor, find_weights
from graphopt.config.pruning import MagnitudePrunerConfig
from graphopt.config.selection import Selector
from graphopt.errors import ConfigWarning
from graphopt.ir.annotations import WeightAnnotation, annotate_pruning
from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass
from graphopt.schemes.prune import unfit
from graphopt.specs import PruningSpec

__all__ = ["AnnotatePruning"]


@dataclass(frozen=True)
class AnnotatePruning(Pass):
    """Attach a pruning spec to the constants that a config selects; the graph stays as it is.

    Attributes:
        config: What is asked for.
        on_unmatched: Whether a key that matches no module, op or state is an error or a warning.

    Examples:
        >>> from graphopt.pruning import MagnitudePrunerConfig
        >>> AnnotatePruning(MagnitudePrunerConfig())(program.graph_module).modified
        True
    """

    name: ClassVar[str] = "annotate-pruning"
    config: MagnitudePrunerConfig
    on_unmatched: Literal["error", "warn"] = "error"

    @override
    def run(self, edit: Editor) -> None:
        selector = Selector(self.config)
        weights = find_weights(edit.gm)
        touch_modules(edit.gm, selector, weights)
        rows = []
        for weight in weights:
            decision = decide(weight, selector, PruningSpec, partial(_refusal, weight), "prune")
            if decision.spec is not None:
                annotation = WeightAnnotation(decision.spec, weight.output_axis, decision.path)
                for node in weight.nodes:
                    annotate_pruning(node, annotation)
                edit.changed = True
            elif weight.tensor.ndim >= 2 or weight.compressed or decision.chosen:
                rows.append(skipped_row(weight, decision))
        remarks = report_unmatched(selector, edit.gm, weights, self.on_unmatched)
        edit.record(rows, remarks=remarks)


def _refusal(weight: WeightTensor, spec: PruningSpec) -> str:
    if weight.tensor.dtype not in FLOAT_DTYPES:
        return f"{weight.tensor.dtype} values are not pruned"
    if weight.sparse is not None:
        return "is pruned already"
    if weight.tensor.numel() == 0:
        return "has no elements"
    if weight.tensor.ndim < 2 and all(use.role == "bias" for use in weight.uses):
        return "biases are kept whole, which costs next to nothing"
    reason = unfit(tuple(weight.tensor.shape), spec)
    if reason:
        warnings.warn(f"{weight.name}: {reason}; left as it is", ConfigWarning, stacklevel=2)
    return reason
