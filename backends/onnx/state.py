"""State as the ecosystem has it: `past_<name>` comes in, `present_<name>` goes out."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, OutputSpec
from torch.utils import _pytree as pytree

from graphopt.ir.program import Program
from graphopt.ir.state import state_of

__all__ = ["PAST", "PRESENT", "add_state", "initial_state", "outputs_of_state"]

PAST, PRESENT = "past_", "present_"


def outputs_of_state(exported: ExportedProgram) -> list[str]:
    """Make the new values of buffers that a program writes outputs, behind its own.

    Args:
        exported: It is changed.

    Returns:
        Names of the buffers, in the order of these outputs.
    """
    signature = exported.graph_signature
    (output,) = exported.graph.find_nodes(op="output")
    pairs = list(zip(signature.output_specs, output.args[0], strict=True))
    kept = [pair for pair in pairs if pair[0].kind is not OutputKind.BUFFER_MUTATION]
    state = [pair for pair in pairs if pair[0].kind is OutputKind.BUFFER_MUTATION]
    written = [(OutputSpec(OutputKind.USER_OUTPUT, spec.arg, None), value) for spec, value in state]
    if not written:
        return []
    signature.output_specs = [spec for spec, _ in (*kept, *written)]
    flat = pytree.tree_structure(tuple(range(len(kept) + len(written))))
    exported.module_call_graph[0].signature.out_spec = flat
    output.args = (tuple(value for _, value in (*kept, *written)),)
    exported.graph_module.recompile()
    return [str(spec.target) for spec, _ in state]


def add_state(model: Any, names: list[str]) -> None:
    """Make state inputs, and give its outputs their names.

    Args:
        model: Of onnx_ir, before anything is folded; its last outputs are those of state.
        names: The buffers' names, in their order.
    """
    import onnx_ir as ir

    graph = model.graph
    first = len(graph.outputs) - len(names)
    for place, name in enumerate(names, start=first):
        value = graph.outputs[place]
        others = [other for other in graph.outputs if other is not value]
        if value.producer() is None or len(others) < len(graph.outputs) - 1:
            copied = ir.node("Identity", [value])
            graph.append(copied)
            copied.outputs[0].type, copied.outputs[0].shape = value.type, value.shape
            value = copied.outputs[0]
            graph.outputs[place] = value
        value.name = f"{PRESENT}{name}"
        held = graph.initializers.pop(name, None)
        if held is None:  # written, and read by nothing
            held = ir.Value(shape=value.shape, type=value.type)
        held.name, held.const_value = f"{PAST}{name}", None
        graph.inputs.append(held)


def initial_state(program: Program) -> dict[str, Tensor]:
    """What the first call of a sequence gets: the buffers' values, by the names of the inputs.

    Args:
        program: Whose state it is.
    """
    gm = program.graph_module
    return {f"{PAST}{name}": gm.get_buffer(name).detach().clone() for name in state_of(gm)}
