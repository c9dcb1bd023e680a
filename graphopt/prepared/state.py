"""The modules and tensors of a prepared graph."""

from __future__ import annotations

from typing import Any

from torch import nn

from graphopt.ir.captured_module import CapturedModule, holder_of
from graphopt.prepared import QUANTIZERS

__all__ = ["parts_of", "take_state"]


def parts_of(module: nn.Module, kind: type[Any]) -> list[Any]:
    """The submodules of one type."""
    return [part for part in module.modules() if isinstance(part, kind)]


def take_state(gm: CapturedModule, prepared: CapturedModule) -> None:
    """Let a graph compute with the tensors of the prepared one, which has the same names."""
    stored = [
        *prepared.named_parameters(remove_duplicate=False),
        *prepared.named_buffers(remove_duplicate=False),
    ]
    for path, tensor in stored:
        if path.startswith(f"{QUANTIZERS}."):
            continue
        holder, name = holder_of(gm, path)
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(name, tensor)
        else:
            holder._buffers[name] = tensor
