"""Raise programs in a target's ops back to our vocabulary, by each target's own passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from typing_extensions import override

from graphopt.backends import load_backend
from graphopt.backends.registry import targets
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import Editor
from graphopt.ir.neutral_form import neutral_form
from graphopt.ir.program import share_graph
from graphopt.ir.torch_private import OpOverload
from graphopt.passes.pass_base import Pass
from graphopt.passes.pass_manager import run_passes
from graphopt.passes.remove_unused import RemoveUnused

__all__ = ["RaiseToVocabulary", "in_vocabulary"]

# namespaces of ops that every target reads
_COMMON = frozenset({"aten", "graphopt", "prims", "quantized_decomposed"})


@dataclass(frozen=True)
class RaiseToVocabulary(Pass):
    """Turn the ops of targets into ours, so that every backend can take the program.

    Before:
        %w = target.lut_to_dense(%indices, %lut, axis)

    After:
        %w = graphopt.lut_to_dense(%packed, %lut, n_bits, shape)

    Each target says in `Backend.raise_` how; targets are only looked at where the graph holds ops
    that neither PyTorch nor we have.

    Examples:
        >>> RaiseToVocabulary()(program.graph_module).modified  # no target has been here
        False
    """

    name: ClassVar[str] = "raise-to-vocabulary"

    @override
    def run(self, edit: Editor) -> None:
        if not _has_other_ops(edit.gm):
            return
        for target in targets():
            for step in load_backend(target).raise_():
                step.run(edit)


def in_vocabulary(gm: CapturedModule) -> CapturedModule:
    """The graph in our ops: the one that was kept when it was finalized, or one raised by rules.

    Args:
        gm: A graph in our ops or a target's; it is not changed.

    Returns:
        `gm` itself where it holds no ops of a target, else a graph that shares its tensors.

    Raises:
        LoweringError: An op has no form in our vocabulary.
    """
    if not _has_other_ops(gm):
        return gm
    neutral = neutral_form(gm)
    if neutral is not None:
        return neutral
    raised = share_graph(gm)
    run_passes(raised, [RaiseToVocabulary(), RemoveUnused()])
    return raised


def _has_other_ops(gm: fx.GraphModule) -> bool:
    return any(
        isinstance(node.target, OpOverload) and node.target.namespace not in _COMMON
        for node in gm.graph.nodes
    )
