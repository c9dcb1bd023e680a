"""From fitted layers to a program in the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.compressors.pipeline import Pipeline
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.passes import (
    AnnotatePalettization,
    AnnotateQuantization,
    ConvertQuantization,
    PalettizeWeights,
    RemoveUnused,
)
from graphopt.passes.pass_base import Pass
from graphopt.schemes.base import StoredWeight
from graphopt.schemes.palettize import PalettizedWeight
from graphopt.schemes.quantize import QuantizedWeight
from graphopt.search.mixed_precision.candidates import Candidate
from graphopt.search.mixed_precision.configs import config_for
from graphopt.search.mixed_precision.layers import Layer
from graphopt.search.rdo.activations import quantize_activations
from graphopt.search.rdo.config import RDOConfig
from graphopt.search.rdo.graph_layers import layers_by_name
from graphopt.search.rdo.layer_fit import LayerFit

__all__ = ["assemble"]

# kind of stored weight → the passes that put such weights into a graph
_PASSES: Mapping[str, Callable[[Any, Any], list[Pass]]] = {
    PalettizedWeight.kind: lambda config, stored: [
        AnnotatePalettization(config),
        PalettizeWeights(stored),
    ],
    QuantizedWeight.kind: lambda config, stored: [
        AnnotateQuantization(config),
        ConvertQuantization(weights=stored),
    ],
}


def assemble(
    exact: Program,
    layers: Sequence[Layer],
    candidates: Mapping[str, Candidate],
    forms: Mapping[str, LayerFit],
    config: RDOConfig,
    data: Sequence[Any],
    *,
    progress: bool | None = None,
) -> CompressedProgram:
    """A program whose weights are the fitted forms, with activations quantized last.

    Args:
        exact: The exact program.
        layers: Its layers.
        candidates: Candidates by name.
        forms: Name of the layer → its form.
        config: Options.
        data: Calibration inputs, for the ranges of activations.
        progress: Show a bar; None shows it on a terminal.
    """
    made = exact.copy()
    gm = made.graph_module
    edit = Editor(gm)
    for name, layer in layers_by_name(gm, layers, config).items():
        bias = forms[name].bias
        if bias is not None and layer.bias is not None:
            edit.set_value(layer.bias, bias)
    kinds: dict[str, dict[str, StoredWeight]] = {kind: {} for kind in _PASSES}
    for name, form in forms.items():
        if form.stored is not None:
            kinds[form.stored.kind][name] = form.stored
    passes: list[Pass] = []
    for kind, stored in kinds.items():
        if stored:
            wanted = config_for({name: candidates[forms[name].candidate] for name in stored}, {})
            passes += _PASSES[kind](wanted, stored)
    done = Pipeline("rdo-assembly", (*passes, RemoveUnused())).run(made)
    return quantize_activations(done, data, config.activations, config.backend, progress=progress)
