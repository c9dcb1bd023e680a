"""Rewrite the ops that coremltools' export frontend does not know, or translates wrongly."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from graphopt.backends.coreml.legal_ops import Rules, composite, legal_ops, rules_by_use
from graphopt.backends.coreml.limits import explain_failure
from graphopt.backends.coreml.numbers import numbers_as_floats
from graphopt.backends.coreml.translations import TRANSLATED
from graphopt.backends.data_sizes import makes_data_size
from graphopt.backends.decompositions import pointwise
from graphopt.backends.decompositions.foreign import foreign_ops
from graphopt.errors import LoweringError
from graphopt.ir.decomposing import decomposed
from graphopt.ir.torch_private import core_aten_decompositions, decomposition_table

__all__ = ["decompose_for_coreml", "rewritten_ops"]

_aten = torch.ops.aten
_ROUNDS = 4


def decompose_for_coreml(exported: ExportedProgram) -> ExportedProgram:
    """Rewrite exactly what coremltools cannot take, so that everything else stays whole.

    Besides the table of ops, two translations of coremltools 9.0 are replaced: `gelu` ignores its
    keyword argument and turns the tanh form into the exact one, and `rms_norm` refuses a default
    epsilon.
    """
    rules = _torchs_rules() | _rules()
    rules |= rules_by_use(exported.graph)
    for _ in range(_ROUNDS):
        # composite ops keep whole unless they are named
        unknown = [op for op in _unknown(exported) if op not in rules]
        rules |= {op: rule for op in unknown if (rule := _foreign(op)) is not None}
        try:
            exported = decomposed(exported, rules)
        except Exception as error:
            raise explain_failure(exported, error) from error
        if not any(_foreign(op) for op in _unknown(exported)):
            break
    _refuse_unknown(exported)
    numbers_as_floats(exported.graph)
    return exported


def rewritten_ops() -> frozenset[Any]:
    """Ops that this module has rules for, beside torch's own; some for certain arguments only."""
    return frozenset(_rules())


def _rules() -> Rules:
    return legal_ops() | {_aten.gelu.default: pointwise.tanh_gelu}


def _refuse_unknown(exported: ExportedProgram) -> None:
    """Name every op that is left without a translation, and where it came from."""
    unknown = set(_unknown(exported))
    lines = [
        f"{node.target}{_where(node)}{_about_sizes(node)}"
        for node in exported.graph.nodes
        if node.op == "call_function" and node.target in unknown
    ]
    if lines:
        raise LoweringError(
            "Core ML has no op for these, and none that they can be written in:\n"
            + "\n".join(dict.fromkeys(lines))
            + "\nleave them out of the model, or run that part elsewhere"
        )


def _about_sizes(node: fx.Node) -> str:
    return ": the size of its result depends on data" if makes_data_size(node) else ""


def _where(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return f" in {stack[-1][0] or 'the model'}" if stack else ""


@cache
def _torchs_rules() -> Rules:
    """Torch's own rules for what coremltools does not know."""
    table = decomposition_table | core_aten_decompositions()
    return {op: rule for op, rule in table.items() if not _known(op)}


def _unknown(exported: ExportedProgram) -> list[Any]:
    targets = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    return [target for target in targets if not _known(target)]


def _known(target: Any) -> bool:
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
    from coremltools.converters.mil.frontend.torch.utils import sanitize_op_kind

    name = target.name() if hasattr(target, "name") else getattr(target, "__name__", str(target))
    kind = sanitize_op_kind(name)
    if kind == "rms_norm":
        return False
    return kind in TRANSLATED or kind in _TORCH_OPS_REGISTRY.name_to_func_mapping


def _foreign(op: Any) -> Callable[..., Any] | None:
    """The rule of an op of another library, or of a composite one."""
    return foreign_ops().get(op) or composite(op)
