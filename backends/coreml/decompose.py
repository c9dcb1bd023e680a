"""Break up the ops that coremltools' export frontend does not know, or translates wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.export import ExportedProgram

__all__ = ["decompose_for_coreml"]

_aten = torch.ops.aten
_ROUNDS = 4


def decompose_for_coreml(exported: ExportedProgram) -> ExportedProgram:
    """Decompose exactly what coremltools cannot take, so that everything else stays whole.

    Two translations of coremltools 9.0 are replaced as well: `gelu` ignores its keyword argument
    and turns the tanh form into the exact one, and `rms_norm` refuses a default epsilon.
    """
    default = torch.export.default_decompositions()
    table: dict[Any, Callable[..., Any]] = {_aten.gelu.default: _tanh_gelu}
    exported = exported.run_decompositions(table)
    for _ in range(_ROUNDS):
        unknown = {
            node.target
            for node in exported.graph.nodes
            if node.op == "call_function" and not _known(node.target)
        }
        rules = {op: rule for op in unknown if (rule := _rule(op, default)) is not None}
        if not rules:
            break
        exported = exported.run_decompositions(rules)
    return exported


def _tanh_gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate != "tanh":
        return NotImplemented
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1.0 + torch.tanh(inner))


def _known(target: Any) -> bool:
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
    from coremltools.converters.mil.frontend.torch.utils import sanitize_op_kind

    name = target.name() if hasattr(target, "name") else getattr(target, "__name__", str(target))
    kind = sanitize_op_kind(name)
    return kind != "rms_norm" and kind in _TORCH_OPS_REGISTRY.name_to_func_mapping


def _rule(op: Any, default: Any) -> Callable[..., Any] | None:
    if op in default:
        return default[op]
    if op in decomposition_table:
        return decomposition_table[op]
    if isinstance(op, torch._ops.OpOverload) and op._can_decompose():
        return op.decompose
    return None
