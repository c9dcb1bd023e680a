"""ProgramSet: entry points of one model, which share weights and state."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphopt.ir.captured_module import CapturedModule, holder_of
from graphopt.ir.program import Program
from graphopt.ir.state import StateTensor, state_nodes
from graphopt.ir.torch_private import FakeTensor, FakeTensorMode

__all__ = ["ProgramSet", "own_state"]


def own_state(method: str, name: str) -> str:
    """Name of a method's state where all methods stand in one graph."""
    return f"state_of_{method}.{name}"


@dataclass(frozen=True)
class ProgramSet:
    """Programs that share weights, by name, and state, by the names of their buffers.

    Attributes:
        methods: Name of an entry point → its program.
    """

    methods: Mapping[str, Program]

    def __getitem__(self, name: str) -> Program:
        return self.methods[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.methods)

    def __len__(self) -> int:
        return len(self.methods)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.methods)})"

    @property
    def state(self) -> tuple[StateTensor, ...]:
        """What any of the methods changes, each tensor once."""
        found: dict[str, StateTensor] = {}
        for program in self.methods.values():
            for each in program.state:
                found.setdefault(each.name, each)
        return tuple(found.values())

    def merged(self) -> Program:
        """One program that computes all methods side by side, each weight stored once.

        Its inputs are those of all methods, its outputs too; each method has state of its own. What
        compresses it decides each shared weight once, from the data of all of them.
        """
        return _Merge(self).program()

    def split(self, merged: Program) -> ProgramSet:
        """The methods of what passes made of `merged()`; they share its tensors.

        Args:
            merged: Its inputs and outputs are as they were.
        """
        return _split(self, merged)


def _identity(value: Tensor) -> tuple[Any, ...]:
    return value.data_ptr(), value.dtype, tuple(value.shape), value.stride()


class _Merge:
    def __init__(self, programs: ProgramSet) -> None:
        self.programs = programs
        self.root, self.graph = nn.Module(), fx.Graph()
        self.paths: dict[tuple[Any, ...], str] = {}
        self.mode: FakeTensorMode | None = None

    def program(self) -> Program:
        names: list[str] = []
        example: list[Any] = []
        copied: dict[str, dict[fx.Node, fx.Node]] = {}
        for method, program in self.programs.methods.items():
            copied[method] = {}
            example += pytree.tree_leaves((program.example_args, program.example_kwargs))
            for node in program.graph_module.graph.find_nodes(op="placeholder"):
                made = self.graph.placeholder(f"{method}_{node.target}")
                made.meta = self._meta(node)
                names.append(str(made.target))
                copied[method][node] = made
        outputs: list[Any] = []
        for method, program in self.programs.methods.items():
            outputs += self._copy(method, program.graph_module, copied[method])
        self.graph.output(tuple(outputs))
        spec = pytree.tree_structure(((*example,), {}))
        info = fx.graph._PyTreeInfo(names, spec, pytree.tree_structure(tuple(outputs)))
        self.graph.set_codegen(fx.graph._PyTreeCodeGen(info))
        gm = CapturedModule(self.root, self.graph)
        gm.eval()
        first = next(iter(self.programs.methods.values()))
        return Program(gm, tuple(example), {}, first.provenance)

    def _copy(self, method: str, gm: CapturedModule, known: dict[fx.Node, fx.Node]) -> list[Any]:
        state = {node for node in state_nodes(gm) if node.op == "get_attr"}
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return [_mapped(leaf, known) for leaf in pytree.tree_leaves(node.args[0])]
            made = self.graph.node_copy(node, known.__getitem__)
            made.meta = self._meta(node)
            if node.op in ("get_attr", "call_module"):
                made.target = self._stored(method, gm, str(node.target), is_state=node in state)
            known[node] = made
        raise AssertionError("a graph without output")

    def _stored(self, method: str, gm: CapturedModule, path: str, *, is_state: bool) -> str:
        holder, name = holder_of(gm, path)
        value = getattr(holder, name)
        if not isinstance(value, Tensor):
            return self._put(f"{method}.{path}", value, holder, name)
        if is_state:
            # the methods' programs hold one tensor under several objects
            return self._put(own_state(method, path), value.detach().clone(), holder, name)
        key = (id(value),) if not value.numel() else _identity(value)
        if key not in self.paths:
            taken = path in self.paths.values()
            self.paths[key] = self._put(f"{method}.{path}" if taken else path, value, holder, name)
        return self.paths[key]

    def _put(self, path: str, value: Any, source: nn.Module, given: str) -> str:
        holder, name = holder_of(self.root, path, create=True)
        if isinstance(value, nn.Parameter):
            holder.register_parameter(name, value)
        elif isinstance(value, Tensor):
            lasting = given not in source._non_persistent_buffers_set
            holder._buffers.pop(name, None)
            holder.register_buffer(name, value, persistent=lasting)
        else:
            setattr(holder, name, value)
        return path

    def _meta(self, node: fx.Node) -> dict[str, Any]:
        """Metadata of a node, its values in the one mode of the merged graph."""
        meta = dict(node.meta)
        if "val" in meta:
            meta["val"] = pytree.tree_map_only(FakeTensor, self._fake, meta["val"])
        return meta

    def _fake(self, value: FakeTensor) -> Any:
        self.mode = self.mode or value.fake_mode
        if value.fake_mode is self.mode:
            return value
        with self.mode:
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=value.device
            )


def _mapped(leaf: Any, known: Mapping[fx.Node, fx.Node]) -> Any:
    return known[leaf] if isinstance(leaf, fx.Node) else leaf


def _split(programs: ProgramSet, merged: Program) -> ProgramSet:
    gm = merged.graph_module
    (output,) = gm.graph.find_nodes(op="output")
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    leaves = list(output.args[0])
    methods: dict[str, Program] = {}
    kept: dict[str, Tensor] = {}
    for method, program in programs.methods.items():
        before = program.graph_module
        inputs = list(before.graph.find_nodes(op="placeholder"))
        own, placeholders = placeholders[: len(inputs)], placeholders[len(inputs) :]
        (ending,) = before.graph.find_nodes(op="output")
        count = len(pytree.tree_leaves(ending.args[0]))
        given, leaves = leaves[:count], leaves[count:]
        part = _part(method, gm, own, inputs, given, kept)
        part.graph.set_codegen(copy.copy(before.graph._codegen))
        part.recompile()
        for hook in before._forward_pre_hooks.values():
            part.register_forward_pre_hook(hook, with_kwargs=True)
        part.meta.update(gm.meta)
        methods[method] = replace(program, graph_module=part)
    return ProgramSet(methods)


def _part(
    method: str,
    gm: CapturedModule,
    own: list[fx.Node],
    inputs: list[fx.Node],
    outputs: list[Any],
    kept: dict[str, Tensor],
) -> CapturedModule:
    """One method of a merged graph; `kept` has the state of the methods before."""
    prefix = own_state(method, "")
    needed: set[fx.Node] = set()
    writers = [
        writer
        for node, writer in state_nodes(gm).items()
        if str(node.target).startswith(prefix) or node in own
    ]
    pending = [leaf for leaf in outputs if isinstance(leaf, fx.Node)] + writers
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    root, graph, known = nn.Module(), fx.Graph(), {}
    for node, original in zip(own, inputs, strict=True):
        known[node] = graph.placeholder(str(original.target))
        known[node].meta = dict(original.meta)
    for node in gm.graph.nodes:
        if node not in needed or node in known or node.op == "output":
            continue
        made = known[node] = graph.node_copy(node, known.__getitem__)
        if node.op in ("get_attr", "call_module"):
            path = str(node.target)
            holder, name = holder_of(gm, path)
            value = getattr(holder, name)
            if path.startswith(prefix):
                path = path.removeprefix(prefix)
                value = kept.setdefault(path, value)
            made.target = path
            target, own_name = holder_of(root, path, create=True)
            if isinstance(value, nn.Parameter):
                target.register_parameter(own_name, value)
            elif isinstance(value, Tensor):
                target._buffers.pop(own_name, None)
                target.register_buffer(own_name, value)
            else:
                setattr(target, own_name, value)
    graph.output(tuple(_mapped(leaf, known) for leaf in outputs))
    part = CapturedModule(root, graph)
    part.eval()
    return part
