"""What Core AI cannot compute, said before its converter sees a program, and of what it says itself."""

from __future__ import annotations

import re

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.backends.coreai.decompose import converted_ops
from graphopt.backends.data_sizes import makes_data_size, place_of
from graphopt.errors import LoweringError
from graphopt.ir.torch_private import OpOverload

__all__ = ["explain_failure", "refuse_impossible"]

_RANDOM = ("rand", "normal", "bernoulli", "uniform", "multinomial", "dropout", "poisson")
_NAMED = re.compile(r'identifiers = \["([^"]+)"\]')


def refuse_impossible(exported: ExportedProgram) -> None:
    """Check the ops of a decomposed program.

    Raises:
        LoweringError: Core AI lacks an op or a type; every one of them is named.
    """
    reasons: dict[str, None] = {}
    known = converted_ops()
    for node in exported.graph.nodes:
        reason = _reason(node, known)
        if reason:
            reasons.setdefault(f"{place_of(node)}: {reason}")
    if reasons:
        raise LoweringError("Core AI cannot hold this program:\n" + "\n".join(reasons))


def explain_failure(exported: ExportedProgram, error: Exception) -> LoweringError:
    """An error of the converter as ours, with the op that it is about where it says so."""
    text = " ".join(str(error).split())
    found = _NAMED.search(text)
    nodes = {node.name: node for node in exported.graph.nodes}
    place = place_of(nodes[found[1]]) if found and found[1] in nodes else ""
    said = text.split(" metadata = ")[0] if place else text
    return LoweringError(
        f"coreai-torch cannot convert the program: {place + ': ' if place else ''}{said}"
    )


def _reason(node: fx.Node, known: frozenset[str]) -> str:
    values = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    if any(value.is_complex() for value in values):
        return (
            "Core AI's runtime has no complex numbers; compute with real and imaginary parts,"
            " as rotary embeddings do with cosines and sines"
        )
    if node.op != "call_function":
        return ""
    if makes_data_size(node):
        return (
            "the size of its result depends on data, and Core AI's programs have fixed shapes;"
            " use a mask (torch.where) instead of selecting"
        )
    target = str(node.target)
    if target.startswith(("aten.", "prims.")):
        name = target.partition(".")[2]
        if any(part in name for part in _RANDOM):
            return "Core AI has no random numbers; pass them as an input"
        checks = name.startswith(("_assert", "sym_constrain"))
        if (target.startswith("prims.") or name not in known) and not checks:
            return "Core AI's converter has no such op, and it has no decomposition"
    elif isinstance(node.target, OpOverload) and not target.startswith("coreai."):
        return "Core AI's converter does not know the op; register a decomposition of it with torch"
    return ""
