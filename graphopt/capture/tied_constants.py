"""Buffers that a model reads by another way, such as caches in plain objects, are the buffers."""

from __future__ import annotations

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

__all__ = ["tie_constants"]


def tie_constants(exported: ExportedProgram) -> None:
    """Let constants that are a buffer of the model be that buffer, in place.

    torch.export finds tensors that a model holds beside its buffers, as transformers' caches do, and
    lifts them as constants of their own, even where they are registered as buffers too. What the
    model writes into them would be no state.

    Args:
        exported: As torch.export gives it, before any decomposition.
    """
    signature = exported.graph_signature
    nodes = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    state = {**exported.state_dict, **exported.constants}
    buffers = {
        _place(state.get(str(spec.target))): spec.arg.name
        for spec in signature.input_specs
        if spec.kind is InputKind.BUFFER
    }
    kept = []
    for spec in signature.input_specs:
        if spec.kind is InputKind.CONSTANT_TENSOR:
            place = _place(state.get(str(spec.target)))
            if place is not None and place in buffers:
                node = nodes[spec.arg.name]
                node.replace_all_uses_with(nodes[buffers[place]])
                exported.graph.erase_node(node)
                exported.constants.pop(str(spec.target), None)
                continue
        kept.append(spec)
    if len(kept) != len(signature.input_specs):
        signature.input_specs = kept
        exported.graph_module.recompile()


def _place(value: object) -> tuple[object, ...] | None:
    if not isinstance(value, Tensor) or not value.numel():
        return None
    return value.data_ptr(), value.dtype, tuple(value.shape), value.stride()
