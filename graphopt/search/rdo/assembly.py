"""From fitted layers to a program in the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.compressors.pipeline import Pipeline
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.quantization import QuantizerConfig
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
from graphopt.schemes.palettize import PalettizedWeight
from graphopt.schemes.quantize import QuantizedWeight
from graphopt.search.mixed_precision.candidates import Candidate
from graphopt.search.mixed_precision.configs import config_for
from graphopt.search.mixed_precision.layers import Layer
from graphopt.search.rdo.activations import quantize_activations
from graphopt.search.rdo.config import RDOConfig
from graphopt.search.rdo.fits import Fitted
from graphopt.search.rdo.graph_layers import layers_by_name

__all__ = ["assemble"]


def assemble(
    exact: Program,
    layers: Sequence[Layer],
    candidates: Mapping[str, Candidate],
    forms: Mapping[str, Fitted],
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
    for name, site in layers_by_name(gm, layers, config).items():
        bias = forms[name].bias
        if bias is not None and site.bias is not None:
            edit.set_value(site.bias, bias)
    passes: list[Pass] = []
    palettes = {n: f.stored for n, f in forms.items() if isinstance(f.stored, PalettizedWeight)}
    integers = {n: f.stored for n, f in forms.items() if isinstance(f.stored, QuantizedWeight)}
    if palettes:
        tables = config_for({n: candidates[forms[n].candidate] for n in palettes}, {})
        assert isinstance(tables, KMeansPalettizerConfig)
        passes += [AnnotatePalettization(tables), PalettizeWeights(palettes)]
    if integers:
        grids = config_for({n: candidates[forms[n].candidate] for n in integers}, {})
        assert isinstance(grids, QuantizerConfig)
        passes += [AnnotateQuantization(grids), ConvertQuantization(weights=integers)]
    done = Pipeline("rdo-assembly", (*passes, RemoveUnused())).run(made)
    return quantize_activations(done, data, config.activations, config.backend, progress=progress)
