"""FitIntegers: quantized weights against the outputs of their layers, as a pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx
from typing_extensions import override

from graphopt.analysis.weights import find_weights
from graphopt.errors import CalibrationError
from graphopt.fitting.algorithms import CALIBRATED_INTEGERS, INTEGER_ALGORITHMS
from graphopt.fitting.channel_moments import moved_bias
from graphopt.fitting.evidence import Evidence, Integers, Resources
from graphopt.ir import op_info
from graphopt.ir.annotations import is_fused_norm, quantization_annotation
from graphopt.ir.captured_module import callable_graph
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program, share_graph
from graphopt.passes.annotate_quantization import AnnotateQuantization
from graphopt.passes.fold_batchnorm import FoldBatchNorm
from graphopt.passes.pass_base import Pass
from graphopt.prepared.findings import findings_of, keep_findings
from graphopt.run.calibration_data import read_calls

__all__ = ["FitIntegers"]


@dataclass(frozen=True)
class FitIntegers(Pass):
    """Find the elements of annotated weights whose specs ask for error feedback.

    The graph stays as it is, but for biases, and shifts of norms that are folded later, which take up
    the mean error of their layers; `ConvertQuantization` uses what was found. The scales of
    activations are to be known before.

    Attributes:
        data: Inputs of one call each, as for `as_batch`; None leaves "auto" to the nearest elements.
        seed: Seed of the sample of positions.
        progress: Show a bar; None shows it on a terminal.
        resources: Where layers are fitted.

    Raises:
        CalibrationError: A spec has algorithm "gptq" and there are no data.

    Examples:
        >>> from graphopt.passes import AnnotateQuantization, ConvertQuantization
        >>> from graphopt.quantization import QuantizerConfig
        >>> gm = program.graph_module
        >>> for step in (AnnotateQuantization(QuantizerConfig.presets.w4()), FitIntegers(batches)):
        ...     _ = step(gm)
        >>> ConvertQuantization()(gm).modified
        True
    """

    name: ClassVar[str] = "fit-integers"
    after: ClassVar[tuple[type[Pass], ...]] = (AnnotateQuantization,)
    tolerance: ClassVar[float | None] = None
    data: Sequence[Any] | None = None
    seed: int = 0
    progress: bool | None = None
    resources: Resources = field(default_factory=Resources)

    @override
    def run(self, edit: Editor) -> None:
        gm = callable_graph(edit.gm)
        findings = findings_of(gm)
        wanted: dict[str, list[str]] = {}
        waiting: dict[str, list[str]] = {}
        for weight in find_weights(gm):
            annotation = quantization_annotation(weight.nodes[0])
            found = weight.sparse is not None or weight.name in findings.stored
            if annotation is None or found:
                continue
            word = annotation.spec.algorithm
            algorithm = INTEGER_ALGORITHMS[CALIBRATED_INTEGERS if word == "auto" else word]
            if not algorithm.needs_inputs:
                continue
            wanted.setdefault(algorithm.name, []).append(weight.name)
            trained = findings.quantizers.get(weight.name)
            if word != "auto" and (trained is None or not trained.is_fitted):
                waiting.setdefault(word, []).append(f"{weight.name} ({annotation.path})")
        if not self.data:
            if waiting:
                raise CalibrationError(
                    f"there are no data for algorithm {' and '.join(map(repr, waiting))}:\n"
                    + "\n".join(itertools.chain.from_iterable(waiting.values()))
                    + "\ngive calibration data, or set algorithm 'auto' or 'nearest'"
                )
            return
        if not wanted:
            return
        # weights are fitted as they will be stored, with their norms
        shifts, folded = _shifts_of_norms(edit), share_graph(gm)
        FoldBatchNorm()(folded)
        stored = Editor(folded)
        before = {str(node.target): stored.value(node).detach() for node in stored.constants()}
        evidence = Evidence(
            list(read_calls(gm, self.data)),
            seed=self.seed,
            progress=self.progress,
            scales=findings.scales,
            resources=self.resources,
        )
        fit = Integers()
        for chosen, names in wanted.items():
            INTEGER_ALGORITHMS[chosen].fit(Program(folded, ()), names, evidence, fit)
        nodes = {str(node.target): node for node in edit.constants()}
        for path, value in fit.biases.items():
            node = nodes.get(shifts.get(path, path))
            if node is not None:
                change = value.double() - before[path].double()
                edit.set_value(node, moved_bias(edit.value(node), change))
        keep_findings(gm, stored={**findings.stored, **fit.weights})
        edit.record(remarks=fit.remarks)


def _shifts_of_norms(edit: Editor) -> dict[str, str]:
    """Bias of a convolution once its norm is folded → the shift of the norm."""
    shifts = {}
    for norm in edit.calls(op_info.BATCH_NORM):
        conv, shift = norm.args[0], norm.args[2]
        if not is_fused_norm(norm) or not isinstance(conv, fx.Node):
            continue
        info = op_info.info_of(conv)
        slot = None if info is None else info.weights[0]
        weight = None if slot is None else conv.args[slot.position]
        bias = None if slot is None else op_info.argument(conv, slot.bias)
        if isinstance(weight, fx.Node) and isinstance(shift, fx.Node):
            owner = str(weight.target).rpartition(".")[0]
            own = f"{owner}.bias" if owner else "bias"
            shifts[str(bias.target) if isinstance(bias, fx.Node) else own] = str(shift.target)
    return shifts
