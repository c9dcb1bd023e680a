"""Capture of several entry points of one model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from graphopt.errors import InputError
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.ir.program_set import ProgramSet
from graphopt.ir.state import state_of

__all__ = ["captured_set", "with_shared_tensors"]


def captured_set(
    entries: Mapping[str, Any], capture: Callable[..., Program], dynamic_shapes: Any
) -> ProgramSet:
    """The programs of a model's entry points.

    Args:
        entries: Name → (module or method, example), the example a tensor, a tuple of positional
            inputs or a dict of keyword ones; a third item says `dynamic_shapes` of this one.
        capture: What captures one.
        dynamic_shapes: Of the others.

    Raises:
        InputError: There is none, a name is no identifier, or something else stands for a model.
    """
    if not entries:
        raise InputError("there are no entry points; give {'name': (module or method, example)}")
    methods = {}
    for name, entry in entries.items():
        if not name.isidentifier():
            raise InputError(f"{name!r} is no name of an entry point: use letters, digits and _")
        if not isinstance(entry, tuple | list) or len(entry) not in (2, 3):
            raise InputError(
                f"{name}: give (module or method, example), got {type(entry).__name__}"
            )
        model, example = _as_module(entry[0]), entry[1]
        args = () if isinstance(example, Mapping) else example
        kwargs = example if isinstance(example, Mapping) else None
        shapes = entry[2] if len(entry) == 3 else dynamic_shapes
        methods[name] = capture(model, args, kwargs, shapes)
    states = {each.name for program in methods.values() for each in program.state}
    for program in methods.values():
        _keep_as_state(program.graph_module, states)
    return ProgramSet(methods)


def with_shared_tensors(programs: Mapping[str, ExportedProgram]) -> None:
    """Let programs of one file share their parameters and buffers of equal name and value again.

    Args:
        programs: Name → program, changed in place; what one of them writes stays its own.
    """
    written = {
        name
        for program in programs.values()
        for name in program.graph_signature.buffers_to_mutate.values()
    }
    known: dict[str, Tensor] = {}
    for program in programs.values():
        for name, value in program.state_dict.items():
            shared = known.setdefault(name, value)
            alike = shared.dtype == value.dtype and shared.shape == value.shape
            if name not in written and alike and torch.equal(shared, value):
                program.state_dict[name] = shared


def _keep_as_state(gm: CapturedModule, states: set[str]) -> None:
    """Write back what a method only reads of the others' state, which would be a constant of it.

    Args:
        gm: The method's graph.
        states: Names of what any of the methods writes.
    """
    edit, own = Editor(gm), set(state_of(gm))
    (output,) = gm.graph.find_nodes(op="output")
    for node in edit.constants():
        name = str(node.target)
        if name not in states or name in own or not node.users:
            continue
        own.add(name)
        same = edit.call(torch.ops.aten.clone.default, node, like=node, before=output)
        edit.call(torch.ops.aten.copy_.default, node, same, like=node, before=output)
    gm.recompile()


def _as_module(model: Any) -> Any:
    owner = getattr(model, "__self__", None)
    if not inspect.ismethod(model) or not isinstance(owner, nn.Module):
        return model
    if model.__name__ == "forward":
        return owner
    return _method_module(owner, model.__name__)


def _method_module(owner: nn.Module, method: str) -> nn.Module:
    """A module over the tensors of another one whose forward is a method of it."""
    made: nn.Module = object.__new__(type(owner))
    # the tables of tensors and submodules are the owner's own; the method is bound to the owner, as
    # it may call its other ones
    made.__dict__ = {**owner.__dict__, "forward": getattr(owner, method)}
    return made
