"""Names that coremltools would take for something else: a state, or the text of an argument."""

from __future__ import annotations

from dataclasses import replace

from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.errors import LoweringError

__all__ = ["leave_names"]


def leave_names(exported: ExportedProgram) -> None:
    """Rename values that are called as a state is, or as an argument's text ("floor", "constant").

    coremltools has one dictionary of values and states, and looks every text up in it: a rounding
    mode becomes the result of the op before it that has its name.

    Args:
        exported: It is changed.

    Raises:
        LoweringError: An input has such a name, which callers use.
    """
    signature = exported.graph_signature
    texts = {text: node for node in exported.graph.nodes for text in _texts(node)}
    states = set(signature.buffers_to_mutate.values())
    taken = {node.name for node in exported.graph.nodes} | states | set(texts)
    given = set(signature.user_inputs)
    renamed = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in given & set(texts):
            raise LoweringError(
                f"Core ML cannot hold this program: its input {node.name!r} is called as an argument"
                f" of {texts[node.name].target} is; give the input another name"
            )
        if node.op in ("placeholder", "output") or node.name not in states | set(texts):
            continue
        name = f"{node.name}_value"
        while name in taken:
            name += "_"
        taken.add(name)
        renamed[node.name] = name
        node._rename(name)
    for spec in signature.output_specs:
        if getattr(spec.arg, "name", None) in renamed:
            spec.arg = replace(spec.arg, name=renamed[spec.arg.name])
    exported.graph_module.recompile()


def _texts(node: fx.Node) -> list[str]:
    if node.op != "call_function":
        return []
    return [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, str)]
