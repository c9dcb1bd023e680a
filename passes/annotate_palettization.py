"""Decide for every candidate tensor what a palettization config makes of it."""

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
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.selection import Selector
from graphopt.errors import CompressionError, ConfigWarning
from graphopt.ir.annotations import WeightAnnotation, annotate_weight
from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass
from graphopt.schemes.forms import NO_VECTORS, Held, chosen_form
from graphopt.schemes.layout import plan_layout
from graphopt.specs import PalettizationSpec, PerTensorGranularity

__all__ = ["AnnotatePalettization"]


@dataclass(frozen=True)
class AnnotatePalettization(Pass):
    """Attach a `WeightAnnotation` to the constants that a config selects.

    The graph's nodes stay as they are; `gm.meta` gets the table of what will not be compressed and
    why.

    Attributes:
        config: What is asked for.
        on_unmatched: Whether a key that matches no module, op or state is an error or a warning.
            Module types are always a warning, since one config serves many models.
        held: Which tables the target has, for specs with a `max_table_share`, which get no others;
            None is all.

    Examples:
        >>> from graphopt.palettization import KMeansPalettizerConfig
        >>> captured = graphopt.capture(model, example)
        >>> AnnotatePalettization(KMeansPalettizerConfig())(captured.graph_module).modified
        True
    """

    name: ClassVar[str] = "annotate-palettization"
    config: KMeansPalettizerConfig
    on_unmatched: Literal["error", "warn"] = "error"
    held: Held | None = None

    @override
    def run(self, edit: Editor) -> None:
        selector = Selector(self.config)
        weights = find_weights(edit.gm)
        touch_modules(edit.gm, selector, weights)
        rows = []
        for weight in weights:
            refusal = partial(self._refusal, weight)
            decision = decide(weight, selector, PalettizationSpec, refusal, "palettize")
            if decision.spec is not None:
                spec = self._form_of(weight, decision.spec)
                longer = self._form_of(weight, decision.spec, Held()).cluster_dim > spec.cluster_dim
                note = NO_VECTORS if longer else ""
                vectors = self.config.schedule_at(decision.path, "vector_kmeans_config")
                if vectors is not None and spec.cluster_dim > 1 and spec.vector_kmeans is None:
                    spec = spec.model_copy(update={"vector_kmeans": vectors})
                annotation = WeightAnnotation(spec, weight.output_axis, decision.path, note)
                for node in weight.nodes:
                    annotate_weight(node, annotation)
                edit.changed = True
            elif weight.tensor.ndim >= 2 or weight.compressed or decision.chosen:
                rows.append(skipped_row(weight, decision))
        remarks = report_unmatched(selector, edit.gm, weights, self.on_unmatched)
        edit.record(rows, remarks=remarks)

    def _refusal(self, weight: WeightTensor, spec: PalettizationSpec) -> str:
        if weight.tensor.dtype not in FLOAT_DTYPES:
            return f"{weight.tensor.dtype} values are not palettized"
        if weight.tensor.numel() == 0:
            return "has no elements"
        threshold = self.config.weight_threshold
        if weight.tensor.numel() <= threshold:
            return f"{weight.tensor.numel()} elements do not exceed weight_threshold={threshold}"
        if weight.sparse is not None and _of_values(spec) != spec:
            spec = _of_values(spec)
            warnings.warn(
                f"{weight.name}: its values, which pruning has left, get one scalar table by k-means",
                ConfigWarning,
                stacklevel=2,
            )
        try:
            form = self._form_of(weight, spec)
            layout = plan_layout(weight.tensor.shape, weight.output_axis, form)
        except CompressionError as error:
            warnings.warn(f"{weight.name}: {error}; left as it is", ConfigWarning, stacklevel=2)
            return str(error)
        if layout.note:
            warnings.warn(f"{weight.name}: {layout.note}", ConfigWarning, stacklevel=2)
        return ""

    def _form_of(
        self, weight: WeightTensor, spec: PalettizationSpec, held: Held | None = None
    ) -> PalettizationSpec:
        """What a spec means for one weight."""
        if weight.sparse is not None:
            return _of_values(spec)
        tables = held or self.held
        return chosen_form(spec, weight.tensor.shape, weight.output_axis, tables)


def _of_values(spec: PalettizationSpec) -> PalettizationSpec:
    """What a spec means for the values of a pruned weight, which know no channels: one scalar table."""
    rate, rest = divmod(spec.n_bits, spec.cluster_dim)
    changes = {
        # the rate of a preset holds for values, too
        "n_bits": spec.n_bits if spec.max_table_share is None or rest else rate,
        "granularity": PerTensorGranularity(),
        "cluster_dim": 1,
        "cluster_axis": None,
        "max_table_share": None,
        "enable_per_channel_scale": False,
        "outlier_fraction": 0.0,
        "algorithm": "kmeans",
    }
    return spec.model_copy(update=changes)
