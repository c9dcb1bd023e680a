"""State as the ecosystem has it: `past_<name>` comes in, `present_<name>` goes out."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

__all__ = ["PAST", "PRESENT", "add_state"]

PAST, PRESENT = "past_", "present_"


def add_state(model: Any, exported: ExportedProgram) -> None:
    """Turn buffers that a program writes into an input and an output each.

    An input's initial value is its default, so that the first call of a sequence needs to give none.

    Args:
        model: Of onnx_ir, as torch exported it, before anything is folded; it is changed.
        exported: What it was exported from.
    """
    import onnx_ir as ir

    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    values |= {value.name: value for value in graph.initializers.values()}
    values |= {value.name: value for value in graph.inputs}
    renamed = {
        value.metadata_props.get("pkg.torch.onnx.original_node_name"): value
        for value in (*graph.inputs, *graph.initializers.values(), *graph.outputs)
    }
    for spec in exported.graph_signature.output_specs:
        if spec.kind is not OutputKind.BUFFER_MUTATION:
            continue
        name = str(spec.target)
        written = values.get(spec.arg.name) or renamed[spec.arg.name]
        if written.producer() is None or written.is_graph_output():
            copied = ir.node("Identity", [written])
            graph.append(copied)
            (fresh,) = copied.outputs
            fresh.type, fresh.shape = written.type, written.shape
            written = fresh
        written.name = f"{PRESENT}{name}"
        graph.outputs.append(written)
        held = graph.initializers.pop(name)
        held.name = f"{PAST}{name}"
        graph.initializers[held.name] = held
        graph.inputs.append(held)
