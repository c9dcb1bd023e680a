"""CalibrateActivations: the ranges of activations from data, as a pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from typing_extensions import override

from graphopt.errors import InputError
from graphopt.ir.captured_module import CapturedModule, callable_graph
from graphopt.ir.editor import Editor
from graphopt.ir.program import share_graph
from graphopt.ir.state import restored_state
from graphopt.passes.annotate_quantization import AnnotateQuantization
from graphopt.passes.insert_fake_quantize import InsertFakeQuantize
from graphopt.passes.pass_base import Pass
from graphopt.prepared import ActivationQuantizer, WeightQuantizer
from graphopt.prepared.conversion import activation_records, scales_of
from graphopt.prepared.findings import findings_of, hold_stored, keep_findings
from graphopt.prepared.state import parts_of
from graphopt.progress import track
from graphopt.run.batches import run_call
from graphopt.run.calibration_data import read_calls, refuse_non_finite

__all__ = ["CalibrateActivations", "calibrate", "observing", "with_quantizers"]


def with_quantizers(gm: CapturedModule) -> CapturedModule:
    """Insert quantizers into an annotated graph, in place; fixed ranges hold at once."""
    InsertFakeQuantize()(gm)
    gm.eval()
    for quantizer in parts_of(gm, ActivationQuantizer):
        # a fixed range needs no data
        quantizer.settle()
        quantizer.rounding = True
    return gm


@contextmanager
def observing(prepared: CapturedModule) -> Iterator[CapturedModule]:
    """Observe the activations of every call; statistics start empty, ranges hold from the end on.

    A call with NaN or Inf among its inputs is refused before it is seen.
    """
    training = prepared.training
    prepared.eval()
    quantizers = parts_of(prepared, ActivationQuantizer)
    for quantizer in quantizers:
        quantizer.reset()
        quantizer.observing, quantizer.rounding = True, False
    numbers = itertools.count()
    watch = prepared.register_forward_pre_hook(
        lambda module, args, kwargs: refuse_non_finite(prepared, (args, kwargs), next(numbers)),
        with_kwargs=True,
    )
    try:
        with torch.no_grad(), restored_state(prepared):
            yield prepared
    finally:
        watch.remove()
        for quantizer in quantizers:
            quantizer.settle()
            quantizer.observing, quantizer.rounding = False, True
        prepared.train(training)


def calibrate(prepared: CapturedModule, data: Iterable[Any], progress: bool | None) -> None:
    """Run a prepared module on data, inputs of one call each, while its activations are observed.

    Raises:
        InputError: There are no data, they do not fit, or they hold NaN or Inf.
    """
    total, number = len(data) if isinstance(data, Sized) else 0, 0
    with observing(prepared):
        calls = read_calls(prepared, data, recorded=False)
        for batch in track(calls, "calibrating", total, enabled=progress):
            run_call(prepared, batch)
            number += 1
    if not number:
        raise InputError("there are no data: activations are calibrated by at least one call")


@dataclass(frozen=True)
class CalibrateActivations(Pass):
    """Find the scales of annotated activations; `ConvertQuantization` uses them.

    The graph stays as it is: a copy that shares its tensors runs with observers, weights rounded.
    Where an earlier stage hands on a prepared graph that has observed or learned, its ranges and the
    quantizers of its weights are taken instead.

    Attributes:
        data: Inputs of one call each, as for `as_batch`; None where every range is fixed.
        on_unobserved: "skip" leaves activations without a usable range in float.
        progress: Show a bar; None shows it on a terminal.
        rounded_weights: Observe what rounded weights give, as the target will; torchao observes what
            the float ones give.

    Examples:
        >>> from graphopt.passes import AnnotateQuantization, ConvertQuantization
        >>> from graphopt.quantization import QuantizerConfig
        >>> steps = (AnnotateQuantization(QuantizerConfig()), CalibrateActivations(batches))
        >>> gm = program.graph_module
        >>> for step in (*steps, ConvertQuantization()):
        ...     _ = step(gm)
        >>> rounded = torch.ops.quantized_decomposed.quantize_per_tensor.default
        >>> len(gm.graph.find_nodes(op="call_function", target=rounded))
        2
    """

    name: ClassVar[str] = "calibrate-activations"
    after: ClassVar[tuple[type[Pass], ...]] = (AnnotateQuantization,)
    data: Iterable[Any] | None = None
    on_unobserved: Literal["error", "skip"] = "error"
    progress: bool | None = None
    rounded_weights: bool = True

    @override
    def run(self, edit: Editor) -> None:
        gm = callable_graph(edit.gm)
        prepared = findings_of(gm).prepared
        if prepared is None:
            prepared = with_quantizers(share_graph(gm))
            for quantizer in parts_of(prepared, WeightQuantizer):
                quantizer.rounding = self.rounded_weights
            hold_stored(prepared, gm)
            if self.data is not None:
                calibrate(prepared, self.data, self.progress)
        else:
            trained = {part.origin.name: part for part in parts_of(prepared, WeightQuantizer)}
            keep_findings(gm, quantizers=trained, prepared=None)
        keep_findings(gm, scales=scales_of(prepared, self.on_unobserved))
        edit.record(activations=tuple(activation_records(gm, prepared)))
