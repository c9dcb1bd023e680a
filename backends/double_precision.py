"""Programs in float64 for targets that have none."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from typing_extensions import override

from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.passes.pass_base import Pass
from graphopt.passes.pass_manager import run_passes

__all__ = ["DoubleToSingle", "as_float32", "has_doubles"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DoubleToSingle(Pass):
    """Compute in float32 what a program computes in float64.

    Before:
        %w = get_attr[fc.weight]                 # float64
        %y = zeros([3], dtype=float64)

    After:
        %w = get_attr[fc.weight]                 # float32
        %y = zeros([3], dtype=float32)
    """

    name: ClassVar[str] = "double-to-single"

    @override
    def run(self, edit: Editor) -> None:
        for node in edit.constants():
            value = edit.value(node)
            if value.dtype is torch.float64:
                edit.set_value(node, value.detach().to(torch.float32))
        for node in list(edit.gm.graph.nodes):
            args = pytree.tree_map(_single_type, node.args)
            if args != node.args:
                edit.set_args(node, args)
            for name, given in node.kwargs.items():
                if given is torch.float64:
                    node.update_kwarg(name, torch.float32)
            if _is_double(node.meta.get("val")):
                node.meta["val"] = pytree.tree_map(_single, node.meta["val"])
                edit.changed = True


def as_float32(program: Program, *, quiet: bool = False) -> Program:
    """The program in float32 if some of it is in float64, which a warning of the logger says.

    Args:
        program: It is changed.
        quiet: Without the warning.
    """
    nodes: list[fx.Node] = list(program.graph_module.graph.nodes)
    doubles = [node.name for node in nodes if _is_double(node.meta.get("val"))]
    if not doubles:
        return program
    if not quiet:
        _log.warning(
            "float64 is cast to float32: %s and %d other values", doubles[0], len(doubles) - 1
        )
    run_passes(program.graph_module, [DoubleToSingle()])
    return replace(
        program,
        example_args=pytree.tree_map(_single, program.example_args),
        example_kwargs=pytree.tree_map(_single, program.example_kwargs),
    )


def has_doubles(program: Program) -> bool:
    """Whether some of a program is in float64."""
    return any(_is_double(node.meta.get("val")) for node in program.graph_module.graph.nodes)


def _is_double(value: object) -> bool:
    leaves = pytree.tree_leaves(value)
    return any(isinstance(leaf, Tensor) and leaf.dtype is torch.float64 for leaf in leaves)


def _single_type(value: Any) -> Any:
    return torch.float32 if value is torch.float64 else value


def _single(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype is torch.float64:
        return value.to(torch.float32)
    return value
