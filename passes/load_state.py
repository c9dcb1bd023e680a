"""Let a graph compute with the weights of a saved state dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.errors import InputError
from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass
from graphopt.prepared import QUANTIZERS

__all__ = ["LoadState"]


@dataclass(frozen=True)
class LoadState(Pass):
    """Put the values of a state dict into the parameters and buffers of the same names.

    Attributes:
        state: Name → value; what stands for a quantizer, a pruner or a palette is left out.

    Raises:
        InputError: Names or shapes are not those of the graph.

    Examples:
        >>> gm = program.graph_module
        >>> zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
        >>> LoadState(zeros)(gm).modified
        True
        >>> gm.get_parameter("0.weight").count_nonzero().item()
        0
    """

    name: ClassVar[str] = "load-state"
    tolerance: ClassVar[float | None] = None
    state: Mapping[str, Tensor] = field(default_factory=dict)

    @override
    def run(self, edit: Editor) -> None:
        stored = _tensors(edit.gm)
        given = {
            name: value
            for name, value in self.state.items()
            if not name.startswith(f"{QUANTIZERS}.")
        }
        problems = [f"{name}: missing" for name in stored if name not in given]
        problems += [f"{name}: not in the model" for name in given if name not in stored]
        problems += [
            f"{name}: {tuple(given[name].shape)}, the model has {tuple(tensor.shape)}"
            for name, tensor in stored.items()
            if name in given and given[name].shape != tensor.shape
        ]
        if problems:
            raise InputError(
                "state_dict does not fit; it must come from a model that was prepared with the same"
                " config:\n" + "\n".join(problems)
            )
        with torch.no_grad():
            for name, tensor in stored.items():
                tensor.copy_(given[name])
        edit.changed = True


def _tensors(gm: fx.GraphModule) -> dict[str, Tensor]:
    return dict(gm.state_dict(keep_vars=True))
