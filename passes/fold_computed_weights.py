"""FoldComputedWeights: weights that the graph computes from constants become constants themselves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.analysis.weights import is_decoded, source_of, state_operands
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import Editor, operands
from graphopt.ir.state import state_of, writes
from graphopt.passes.pass_base import Pass
from graphopt.run.interpreter import Interpreter, evaluate

__all__ = ["FoldComputedWeights"]

_PARAMETRIZED = re.compile(r"(?:(.*)\.)?parametrizations\.(\w+)\.original\d*")


@dataclass(frozen=True)
class FoldComputedWeights(Pass):
    """Store the value of a weight that stands behind arithmetic on constants, so that it is found.

    Weight norm, `w * g` and `w + A @ B` are such; a result takes the name of the constant that it
    replaces. Where a source at least half its size has other readers (a tied, scaled embedding), the
    arithmetic stays, as there would be two weights to store.

    Before:
        %g = get_attr[fc.weight_g]
        %v = get_attr[fc.weight_v]
        %w = mul(%v, div(%g, norm(%v)))
        %y = linear(%x, %w)

    After:
        %w = get_attr[fc.weight]
        %y = linear(%x, %w)

    Examples:
        >>> normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(16, 4))
        >>> gm = graphopt.capture(normed, example).graph_module
        >>> FoldComputedWeights()(gm).modified
        True
    """

    name: ClassVar[str] = "fold-computed-weights"

    @override
    def run(self, edit: Editor) -> None:
        constant = Interpreter(cast("CapturedModule", edit.gm)).constant
        state = set(state_of(edit.gm))
        for node in list(edit.gm.graph.nodes):
            for operand, _, role, axis in list(state_operands(node)):
                if role != "weight" or operand not in constant or source_of(operand, axis):
                    continue
                cone = _cone(operand)
                if all(_is_foldable(inner, state) for inner in cone):
                    _fold(edit, operand, cone)


def _cone(node: fx.Node) -> list[fx.Node]:
    """What a node is computed from, and the node, in the order of the graph."""
    inside, waiting = {node}, [node]
    while waiting:
        new = [operand for operand in operands(waiting.pop()) if operand not in inside]
        inside.update(new)
        waiting += new
    return [other for other in node.graph.nodes if other in inside]


def _is_foldable(node: fx.Node, state: set[str]) -> bool:
    if node.op == "get_attr":
        return str(node.target) not in state
    target: Any = node.target
    if node.op != "call_function" or is_decoded(node) or writes(node) or node.is_impure():
        return False
    return torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ())


def _fold(edit: Editor, node: fx.Node, cone: list[fx.Node]) -> None:
    sources = [inner for inner in cone if inner.op == "get_attr"]
    inside = set(cone)
    values: dict[fx.Node, Any] = {}
    shared = {id(edit.value(n)) for n in edit.constants() if not set(n.users) <= inside}
    with torch.no_grad():
        for inner in cone:
            values[inner] = evaluate(edit.gm, inner, values.__getitem__)
    value = values[node]
    kept = sum(edit.value(source).numel() for source in sources if id(edit.value(source)) in shared)
    if not isinstance(value, Tensor) or 2 * kept >= value.numel():
        return
    own = [source for source in sources if id(edit.value(source)) not in shared]
    source = max(own, key=lambda each: (edit.value(each).ndim, edit.value(each).numel()))
    name, old = _name(edit, str(source.target)), edit.value(source)
    folded = value.detach().clone()
    if name == source.target and old.shape == folded.shape:
        edit.set_value(source, folded)
        edit.replace(node, source)
    else:
        trained = any(isinstance(edit.value(each), torch.nn.Parameter) for each in sources)
        edit.replace(node, edit.constant(name, folded, like=node, trained=trained))
    for inner in reversed(cone):
        if inner.op == "get_attr":
            edit.drop(inner)
        elif inner is not node and not inner.users:
            edit.erase(inner)


def _name(edit: Editor, path: str) -> str:
    """The name of the weight whose part a constant was."""
    parametrized = _PARAMETRIZED.fullmatch(path)
    if parametrized is not None:
        return ".".join(part for part in parametrized.groups() if part)
    stem = path.removesuffix("_v")
    if stem != path and f"{stem}_g" in {str(node.target) for node in edit.constants()}:
        return stem
    return path
