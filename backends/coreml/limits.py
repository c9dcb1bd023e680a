"""Why coremltools does not convert a program: op, module, values, and the way out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.backends.data_sizes import place_of
from graphopt.errors import LoweringError

__all__ = ["Progress", "explain_failure", "following"]

_AXES = 5
_HOLDER = re.compile(r'(?:Op|Layer) "(\w+?)(?:_cast_fp16)?",? \(?(?:op_type: |with type ")(\w+)')
_EXECUTED = re.compile(r"While executing %(\w+)")
_RANK = re.compile(r"rank <= 5|rank 6|rank ?[>≥]")
_CONSTANT = re.compile(r"must be const|dynamic weight|not compile.time|symbolic", re.IGNORECASE)
_TYPE = re.compile(r"type domain|dtype|data type", re.IGNORECASE)


class Progress:
    """Where the converter is.

    Attributes:
        name: Of the node that is being translated; "" before the first and behind the last.
    """

    def __init__(self) -> None:
        self.name = ""


@contextlib.contextmanager
def following(progress: Progress) -> Iterator[None]:
    """Note which node coremltools translates, as its errors rarely name it."""
    from coremltools.converters.mil.frontend.torch import ops

    translate = ops.convert_single_node

    def noted(context: Any, node: Any) -> None:
        progress.name = node.name
        translate(context, node)
        progress.name = ""

    ops.convert_single_node = noted
    try:
        yield
    finally:
        ops.convert_single_node = translate


def explain_failure(exported: ExportedProgram, error: Exception, name: str = "") -> LoweringError:
    """An error of coremltools, or of torch's decompositions for it, as ours.

    Args:
        exported: What was converted.
        error: What was raised.
        name: Of the node that was translated; "" where the error itself may name it.
    """
    said = " ".join(str(error).split()) or type(error).__name__
    node = _node(exported, name, said)
    values = [] if node is None else [x.meta.get("val") for x in (*node.all_input_nodes, node)]
    tensors = [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]
    place = "" if node is None else f"{place_of(node)}, {_listed(tensors)}: "
    return LoweringError(
        f"Core ML cannot hold this program:\n{place}{_way_out(said, tensors)}"
        f"\n  coremltools says: {said.partition('Original traceback')[0]}"
    )


def _listed(tensors: list[Tensor]) -> str:
    """Types and sizes of the inputs of an op, and of its result."""
    shown = [f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in tensors]
    return f"{', '.join(shown[:-1]) or 'nothing'} to {shown[-1]}" if shown else "no tensors"


def _node(exported: ExportedProgram, name: str, said: str) -> fx.Node | None:
    nodes = {node.name: node for node in exported.graph.nodes}
    match = _EXECUTED.search(said) or _HOLDER.search(said)
    for candidate in (name, match[1] if match else ""):
        if candidate in nodes:
            return nodes[candidate]
    return None


def _way_out(said: str, given: list[Tensor]) -> str:
    if any(x.is_complex() for x in given):
        return "it has no complex numbers; compute with real and imaginary parts"
    if _RANK.search(said) or any(x.dim() > _AXES for x in given):
        return (
            f"its tensors have {_AXES} axes at most; merge axes with reshape before this op, or"
            " split the tensor"
        )
    if any(0 in x.shape for x in given):
        return "it has no tensors without elements; leave this part out of the model"
    if _CONSTANT.search(said) or "NoneType" in said:
        return (
            "it takes a constant here where the model computes a value; make it a parameter or"
            " buffer, or write the op in others"
        )
    if _TYPE.search(said):
        return "not in these types; convert the inputs with .float() or .int() before this op"
    return "write it in other ops of torch, or compute it outside of the model"
