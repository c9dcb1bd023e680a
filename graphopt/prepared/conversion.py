"""From a prepared graph to what conversion needs: scales, tensors, and records of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from graphopt.analysis.activation_places import places_of
from graphopt.errors import CalibrationError
from graphopt.ir import op_info
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.records import ActivationRecord
from graphopt.numerics.affine import QParams
from graphopt.prepared import ActivationQuantizer
from graphopt.prepared.state import parts_of

__all__ = ["activation_records", "scales_of"]


def scales_of(
    prepared: CapturedModule, on_unobserved: Literal["error", "skip"]
) -> dict[str, QParams]:
    """Sharing group → scale and offset of those with a usable range that is not of each tensor."""
    scales, problems = {}, []
    for quantizer in parts_of(prepared, ActivationQuantizer):
        if quantizer.dynamic:
            continue
        if bool(quantizer.known):
            scales[quantizer.origin.name] = quantizer.parameters_of()
            continue
        reason = quantizer.problem(*quantizer.observed_range()) or "has no range"
        problems.append(f"{quantizer.origin.name} (module {quantizer.origin.module!r}) {reason}")
    if problems and on_unobserved == "error":
        raise CalibrationError(
            "activations without a usable range:\n"
            + "\n".join(problems)
            + "\nrun data that reaches them through calibration_mode() (--data), exclude them in the config, or"
            " pass on_unobserved='skip' to leave them in float"
        )
    return scales


def activation_records(
    annotated: CapturedModule, prepared: CapturedModule
) -> Iterator[ActivationRecord]:
    """One record per activation scale, in the order of the graph."""
    values: dict[str, list[str]] = {}
    reasons: dict[str, list[str]] = {}
    for point, operand, users in places_of(annotated):
        values.setdefault(point.group, []).append(operand.name)
        if users is not None:
            readers = dict.fromkeys(node.name for node, _ in users)
            reasons.setdefault(point.group, []).append(f"read by {', '.join(readers)}")
        elif not point.derived:
            kind = op_info.op_names(operand)[0] if operand.op == "call_function" else operand.op
            reasons.setdefault(point.group, []).append(f"result of {kind}")
    for quantizer in parts_of(prepared, ActivationQuantizer):
        name = quantizer.origin.name
        dtype = str(quantizer.spec.dtype).removeprefix("torch.")
        detail = f"{dtype} {quantizer.spec.qscheme.value}"
        if quantizer.dynamic:
            detail += ", scales from each tensor"
        single = bool(quantizer.known) and quantizer.groups == 1 and not quantizer.dynamic
        low, high = quantizer.observed_range() if single else (None, None)
        scale, offset = quantizer.parameters_of() if single else (None, None)
        yield ActivationRecord(
            name=name,
            nodes=tuple(values.get(name, ())),
            status="quantized" if bool(quantizer.known) else "float",
            detail=detail if bool(quantizer.known) else "no usable range",
            path=quantizer.origin.path,
            why="; ".join(dict.fromkeys(reasons.get(name, ()))),
            scale=None if scale is None else float(scale),
            offset=None if scale is None else (0.0 if offset is None else float(offset)),
            low=None if low is None else float(low),
            high=None if high is None else float(high),
            seen=int(quantizer.seen),
        )
