"""From a prepared graph to what conversion needs: scales, tensors, and records of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn

from graphopt.captured_module import CapturedModule, holder_of
from graphopt.errors import CalibrationError, LoweringError
from graphopt.fake_quantize import ActivationQuantizer
from graphopt.passes.insert_fake_quantize import QUANTIZERS, places_of
from graphopt.program import Program
from graphopt.table import ActivationRecord

__all__ = ["activation_records", "parts_of", "scales_of", "take_state"]


def parts_of(module: nn.Module, kind: type[Any]) -> list[Any]:
    """The submodules of one type."""
    return [each for each in module.modules() if isinstance(each, kind)]


def scales_of(
    prepared: CapturedModule, on_unobserved: Literal["error", "skip"]
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Sharing group → scale and offset of those with a usable range."""
    found, problems = {}, []
    for quantizer in parts_of(prepared, ActivationQuantizer):
        if quantizer.dynamic:
            raise LoweringError(
                f"{quantizer.origin.name}: no target takes scales that are computed at run time"
                f" ({quantizer.origin.path}); use another qparam_calculator_cls than 'dynamic'"
            )
        if bool(quantizer.known):
            found[quantizer.origin.name] = quantizer.parameters_of()
            continue
        reason = quantizer.problem(*quantizer.observed_range()) or "has no range"
        problems.append(f"{quantizer.origin.name} (module {quantizer.origin.module!r}) {reason}")
    if problems and on_unobserved == "error":
        raise CalibrationError(
            "activations without a usable range:\n"
            + "\n".join(problems)
            + "\nrun data that reaches them through calibration_mode(), exclude them in the config, or"
            " pass on_unobserved='skip' to leave them in float"
        )
    return found


def take_state(gm: CapturedModule, prepared: CapturedModule) -> None:
    """Let a graph compute with the tensors of the prepared one, which has the same names."""
    stored = [
        *prepared.named_parameters(remove_duplicate=False),
        *prepared.named_buffers(remove_duplicate=False),
    ]
    for path, tensor in stored:
        if path.startswith(f"{QUANTIZERS}."):
            continue
        holder, name = holder_of(gm, path)
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(name, tensor)
        else:
            holder._buffers[name] = tensor


def activation_records(annotated: Program, prepared: CapturedModule) -> Iterator[ActivationRecord]:
    """One record per activation scale, in the order of the graph."""
    values: dict[str, list[str]] = {}
    for point, operand, _ in places_of(annotated.graph_module):
        values.setdefault(point.group, []).append(operand.name)
    for quantizer in parts_of(prepared, ActivationQuantizer):
        name = quantizer.origin.name
        dtype = str(quantizer.spec.dtype).removeprefix("torch.")
        detail = f"{dtype} {quantizer.spec.qscheme.value}"
        single = bool(quantizer.known) and quantizer.groups == 1
        low, high = quantizer.observed_range() if single else (None, None)
        scale, offset = quantizer.parameters_of() if single else (None, None)
        yield ActivationRecord(
            name=name,
            nodes=tuple(values.get(name, ())),
            status="quantized" if bool(quantizer.known) else "float",
            detail=detail if bool(quantizer.known) else "no usable range",
            path=quantizer.origin.path,
            scale=None if scale is None else float(scale),
            offset=None if scale is None else (0.0 if offset is None else float(offset)),
            low=None if low is None else float(low),
            high=None if high is None else float(high),
            seen=int(quantizer.seen),
        )
