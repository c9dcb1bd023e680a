"""Programs in float types that a target lacks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from typing_extensions import override

from graphopt.analysis.stored_values import find_lookups
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.passes.pass_base import Pass
from graphopt.passes.pass_manager import run_passes
from graphopt.specs.dtypes import dtype_name

__all__ = ["FloatsToSingle", "as_float32", "lacking"]

_log = logging.getLogger(__name__)
Kinds = Set[torch.dtype]


@dataclass(frozen=True)
class FloatsToSingle(Pass):
    """Compute in float32 what a program computes in other float types.

    Before:
        %w = get_attr[fc.weight]                 # float64
        %y = zeros([3], dtype=float64)

    After:
        %w = get_attr[fc.weight]                 # float32
        %y = zeros([3], dtype=float32)

    Attributes:
        kinds: Types that float32 takes the place of.
    """

    name: ClassVar[str] = "floats-to-single"
    kinds: frozenset[torch.dtype] = frozenset({torch.float64})
    tolerance: ClassVar[float | None] = None  # less is rounded

    @override
    def run(self, edit: Editor) -> None:
        single = functools.partial(_single, kinds=self.kinds)
        for node in edit.constants():
            value = edit.value(node)
            if value.dtype in self.kinds:
                edit.set_value(node, value.detach().to(torch.float32))
        for node in list(edit.gm.graph.nodes):
            args = pytree.tree_map(lambda x: torch.float32 if x in self.kinds else x, node.args)
            if args != node.args:
                edit.set_args(node, args)
            for name, given in node.kwargs.items():
                if given in self.kinds:
                    node.update_kwarg(name, torch.float32)
            if _is_of(node.meta.get("val"), self.kinds):
                node.meta["val"] = pytree.tree_map(single, node.meta["val"])
                edit.changed = True


def as_float32(program: Program, lacks: Kinds, *, quiet: bool = False) -> Program:
    """The program in float32 where it is in types that a target lacks, which a warning of the logger says.

    Args:
        program: It is changed.
        lacks: The target's `Capabilities.lacks`.
        quiet: Without the warning.
    """
    kinds = lacking(program, lacks)
    if not kinds:
        return program
    if not quiet:
        values = [
            node.name
            for node in program.graph_module.graph.nodes
            if _is_of(node.meta.get("val"), kinds)
        ]
        names = " and ".join(sorted(map(dtype_name, kinds)))
        others = f" and {len(values) - 1} other values" if len(values) > 1 else ""
        _log.warning("%s is cast to float32: %s%s", names, values[0], others)
    run_passes(program.graph_module, [FloatsToSingle(kinds)])
    single = functools.partial(_single, kinds=kinds)
    return replace(
        program,
        example_args=pytree.tree_map(single, program.example_args),
        example_kwargs=pytree.tree_map(single, program.example_kwargs),
    )


def lacking(program: Program, lacks: Kinds) -> frozenset[torch.dtype]:
    """The types of a program that a target lacks; bfloat16 is one of them where tables are in it.

    Args:
        program: In our vocabulary.
        lacks: The target's `Capabilities.lacks`.
    """
    if not lacks:
        return frozenset()
    gm = program.graph_module
    tables = {lookup.lut_dtype for lookup in find_lookups(gm)}
    kinds = {*lacks, *([torch.bfloat16] if "bfloat16" in tables else [])}
    nodes: list[fx.Node] = list(gm.graph.nodes)
    return frozenset(
        kind for kind in kinds if any(_is_of(node.meta.get("val"), {kind}) for node in nodes)
    )


def _is_of(value: object, kinds: Kinds) -> bool:
    leaves = pytree.tree_leaves(value)
    return any(isinstance(leaf, Tensor) and leaf.dtype in kinds for leaf in leaves)


def _single(value: Any, kinds: Kinds) -> Any:
    if isinstance(value, Tensor) and value.dtype in kinds:
        return value.to(torch.float32)
    return value
