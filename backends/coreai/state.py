"""The state of Core AI programs: tensors that the caller holds and gives to every call by name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor
from torch.export import ExportedProgram

from graphopt.ir.program import Program
from graphopt.ir.state import state_values

__all__ = ["initial_state", "state_names"]


def state_names(exported: ExportedProgram) -> list[str] | None:
    """Names of a program's states: its buffers' own, with what is no letter as an underscore.

    Args:
        exported: As it is converted.
    """
    signature = exported.graph_signature
    mutated = set(signature.buffers_to_mutate.values())
    buffers = [
        buffer for buffer in map(str, signature.inputs_to_buffers.values()) if buffer in mutated
    ]
    others = set(signature.user_inputs)
    return list(_names(buffers, others).values()) or None


def initial_state(program: Program) -> dict[str, Tensor]:
    """Each state's value before the first call, by its name in the artifact.

    A tensor without dimensions has one of size 1 there.

    Args:
        program: What the artifact was made from.
    """
    values = state_values(program.graph_module)
    inputs = {str(node.target) for node in program.graph_module.graph.find_nodes(op="placeholder")}
    names = _names(values, inputs)
    return {names[name]: value.reshape(value.shape or (1,)) for name, value in values.items()}


def _names(buffers: Iterable[str], taken: set[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for buffer in buffers:
        name = re.sub(r"\W", "_", buffer)
        while name in taken or name in names.values():
            name += "_state"
        names[buffer] = name
    return names
