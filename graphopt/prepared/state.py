"""The modules and tensors of a prepared graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from graphopt.ir.captured_module import CapturedModule, holder_of
from graphopt.ir.state import state_of
from graphopt.prepared import QUANTIZERS

__all__ = ["is_read_by", "parts_of", "take_state"]


def parts_of(module: nn.Module, kind: type[Any]) -> list[Any]:
    """The submodules of one type."""
    return [part for part in module.modules() if isinstance(part, kind)]


def is_read_by(gm: fx.GraphModule, constants: Sequence[fx.Node], kind: type[nn.Module]) -> bool:
    """Whether a submodule of one type reads constants, as after an earlier run of what inserts it."""
    called = (user for node in constants for user in node.users if user.op == "call_module")
    return any(isinstance(gm.get_submodule(str(user.target)), kind) for user in called)


def take_state(gm: CapturedModule, prepared: CapturedModule) -> None:
    """Let a graph compute with the tensors of the prepared one, which has the same names.

    What calls have made of the state that the graph writes stays behind.
    """
    state = set(state_of(prepared))
    stored = [
        *prepared.named_parameters(remove_duplicate=False),
        *prepared.named_buffers(remove_duplicate=False),
    ]
    for path, tensor in stored:
        if path.startswith(f"{QUANTIZERS}.") or path in state:
            continue
        holder, name = holder_of(gm, path)
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(name, tensor)
        else:
            holder._buffers[name] = tensor
