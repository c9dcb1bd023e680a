"""Inputs and outputs of programs, in the form that every target can hold."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from graphopt.backends.constant_factories import store_constant_factories
from graphopt.errors import InputError, LoweringError
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.run.batches import as_batch

__all__ = [
    "Interface",
    "as_array",
    "drop_written_inputs",
    "flat_call",
    "flat_interface",
    "match_inputs",
    "named_inputs",
    "output_names",
    "with_outputs",
]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Interface:
    """What a target has as inputs and outputs.

    Attributes:
        scalars: Whether a tensor may have no dimensions, and an input be no tensor.
        types: Element type → the one that stands for it at inputs and outputs, where the target has
            no such there.
        keeps_copies: Whether `aten.clone` gives an output of its own; else a maximum of a value and
            itself does.
    """

    scalars: bool = False
    types: Mapping[torch.dtype, torch.dtype] = field(default_factory=dict)
    keeps_copies: bool = True


def flat_interface(program: Program, target: Interface) -> Program:
    """A copy of a program that takes and gives what a target has: flat lists of tensors.

    A tensor without dimensions has one of size 1 there. An output that is an input, a constant or
    another output is copied. What is no tensor (None, numbers, texts) is left out, as the graph was
    captured for the values that it had.

    Args:
        program: It is not changed.
        target: What the target has.

    Raises:
        LoweringError: The program has no output that is a tensor.
    """
    legal = program.copy()
    edit = Editor(legal.graph_module)
    store_constant_factories(edit)
    given = _separate_outputs(edit, target)
    whole: Any = edit.gm.graph._codegen
    result = whole.pytree_info.out_spec if hasattr(whole, "pytree_info") else None
    keeps = target.scalars and result is not None and result.num_leaves == len(given)
    keeps = keeps and _is_plain(result)
    _set_outputs(edit, given, result if keeps else None)
    leaves, spec = pytree.tree_flatten((program.example_args, program.example_kwargs))
    if target.scalars:
        plain = [_contiguous(leaf) for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(plain, spec)
        return replace(legal, example_args=args, example_kwargs=kwargs)
    example = []
    for node, leaf in zip(_placeholders(edit.gm), leaves, strict=True):
        if isinstance(leaf, Tensor):
            example.append(_restated(edit, node, leaf, target))
        elif not node.users:
            edit.erase(node)
    edit.gm.graph.set_codegen(fx.graph.CodeGen())
    edit.gm.recompile()
    return replace(legal, example_args=tuple(example), example_kwargs={})


def drop_written_inputs(exported: ExportedProgram) -> None:
    """Take the inputs that a program writes to out of its outputs: targets' programs have none such.

    Args:
        exported: It is changed.
    """
    signature = exported.graph_signature
    kept = [
        place
        for place, spec in enumerate(signature.output_specs)
        if spec.kind is not OutputKind.USER_INPUT_MUTATION
    ]
    if len(kept) == len(signature.output_specs):
        return
    (output,) = exported.graph.find_nodes(op="output")
    output.args = (tuple(output.args[0][place] for place in kept),)
    signature.output_specs = [signature.output_specs[place] for place in kept]
    exported.graph.eliminate_dead_code()
    exported.graph_module.recompile()


def flat_call(inputs: Any, target: Interface) -> tuple[Tensor, ...]:
    """The inputs of a call as a program of `flat_interface` takes them.

    Args:
        inputs: A tensor, a tuple or list of positional inputs, or a dict of keyword ones.
        target: What the target has.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(as_batch(inputs)) if isinstance(leaf, Tensor)]
    return tuple(_as_target_has(leaf, target) for leaf in leaves)


def as_array(tensor: Tensor) -> Any:
    """A tensor for numpy, which has no bfloat16: float32 holds each of its numbers.

    Args:
        tensor: On any device.
    """
    held = tensor.detach().cpu().contiguous()
    return (held.to(torch.float32) if held.dtype is torch.bfloat16 else held).numpy()


def output_names(program: Program) -> list[str] | None:
    """Names of a program's outputs by the keys of the mapping that it returns; None for other results.

    Args:
        program: As it was captured. Keys of any depth are joined, what is no name becomes one, and
            names of inputs and of other outputs are not taken again.
    """
    codegen: Any = program.graph_module.graph._codegen
    (output,) = program.graph_module.graph.find_nodes(op="output")
    info = getattr(codegen, "pytree_info", None)
    if info is None:
        return None
    result = pytree.tree_unflatten(pytree.tree_leaves(output.args[0]), info.out_spec)
    taken = {str(node.target) for node in _placeholders(program.graph_module)}
    names = []
    for path, leaf in pytree.tree_leaves_with_path(result):
        if not path or not isinstance(path[0], pytree.MappingKey):
            return None
        if not isinstance(leaf, fx.Node) or not _gives_tensor(leaf):
            continue
        keys = (str(getattr(part, "key", getattr(part, "idx", ""))) for part in path)
        name = re.sub(r"\W", "_", "_".join(keys))
        name = name if name.isidentifier() and not keyword.iskeyword(name) else f"out_{name}"
        while name in taken:
            name += "_out"
        taken.add(name)
        names.append(name)
    return names or None


def with_outputs(program: Program, nodes: Sequence[str]) -> Program:
    """A copy of a program that gives the values of these nodes, and computes no more than it must.

    Args:
        program: It is not changed.
        nodes: Names of its graph's nodes; their values are tensors.
    """
    part = program.copy()
    edit = Editor(part.graph_module)
    by_name = {node.name: node for node in edit.gm.graph.nodes}
    _set_outputs(edit, [by_name[name] for name in nodes])
    for node in reversed(list(edit.gm.graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            edit.erase(node)
    edit.gm.recompile()
    return part


def named_inputs(
    program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Tensor inputs by the names of the graph's inputs.

    Raises:
        InputError: Their number differs.
    """
    inputs = program.graph_module.graph.find_nodes(op="placeholder")
    # fx appends a number to names such as "input" that are builtins; the target has the plain one
    names = [str(node.target) for node in inputs]
    leaves = pytree.tree_leaves((args, kwargs))
    if len(names) != len(leaves):
        raise InputError(f"the program has inputs {names}, {len(leaves)} values were given")
    pairs = zip(names, leaves, strict=True)
    # a tensor without dimensions has one of size 1 in the targets' programs
    return {
        name: leaf.reshape(leaf.shape or (1,)) for name, leaf in pairs if isinstance(leaf, Tensor)
    }


def match_inputs(wanted: Sequence[str], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs by an artifact's own names: by name where they agree, by position where not.

    Raises:
        InputError: Neither works.
    """
    if all(name in given for name in wanted):
        return {name: given[name] for name in wanted}
    if len(wanted) == len(given):
        return dict(zip(wanted, given.values(), strict=True))
    raise InputError(f"the artifact has inputs {list(wanted)}, the program {list(given)}")


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def _gives_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val", torch.empty(1)), Tensor)


def _contiguous(leaf: Any) -> Any:
    return leaf.contiguous() if isinstance(leaf, Tensor) else leaf


def _as_target_has(leaf: Tensor, target: Interface) -> Tensor:
    given = leaf.contiguous().reshape(leaf.shape or (1,))
    return given.to(target.types.get(leaf.dtype, leaf.dtype))


def _restated(edit: Editor, node: fx.Node, leaf: Tensor, target: Interface) -> Tensor:
    """The example of an input as the target has it; the graph gets back what it had."""
    given = _as_target_has(leaf, target)
    if given.shape == leaf.shape and given.dtype == leaf.dtype:
        return given
    readers, value = set(node.users), node
    held = node.meta.get("val")
    if isinstance(held, Tensor) and given.shape == leaf.shape:
        node.meta["val"] = held.to(given.dtype)  # its sizes may be open
    else:
        node.meta["val"] = edit.fake(given)
    behind = _placeholders(edit.gm)[-1].next
    if given.dtype != leaf.dtype:
        value = edit.call(_aten._to_copy.default, value, dtype=leaf.dtype, like=node, before=behind)
    if given.shape != leaf.shape:
        value = edit.call(_aten.squeeze.dims, value, [0], like=node, before=behind)
    edit.redirect(node, value, lambda reader: reader not in readers)
    return given


def _is_plain(spec: Any) -> bool:
    """Whether a structure is made of tuples, lists and mappings, which files can name."""
    children = spec.children()
    return (not children or spec.type in (tuple, list, dict)) and all(map(_is_plain, children))


def _separate_outputs(edit: Editor, target: Interface) -> list[fx.Node]:
    """One node per tensor that a program gives: none of them an input, a constant or another's."""
    (output,) = edit.gm.graph.find_nodes(op="output")
    leaves = [leaf for leaf in pytree.tree_leaves(output.args[0]) if isinstance(leaf, fx.Node)]
    given: list[fx.Node] = []
    for node in leaves:
        if not _gives_tensor(node):
            continue
        value = node.meta.get("val", torch.empty(1))
        own = node
        if value.dtype in target.types:
            kind = target.types[value.dtype]
            own = edit.call(_aten._to_copy.default, own, dtype=kind, like=node, before=output)
        if value.ndim == 0 and not target.scalars:
            own = edit.call(_aten.unsqueeze.default, own, 0, like=node, before=output)
        if own in given or own.op != "call_function":
            own = _copy(edit, own, output, target)
        given.append(own)
    if not given:
        raise LoweringError("the program gives no tensor, and targets have no other outputs")
    return given


def _copy(edit: Editor, node: fx.Node, output: fx.Node, target: Interface) -> fx.Node:
    if node.op == "get_attr":
        # delegates take the constants that they read with them
        copied = edit.value(node).detach().clone()
        node = edit.constant(f"{node.target}_out", copied, like=node, before=output)
    if target.keeps_copies:
        return edit.call(_aten.clone.default, node, like=node, before=output)
    value = node.meta.get("val")
    is_bool = isinstance(value, Tensor) and value.dtype is torch.bool
    larger = _aten.logical_or.default if is_bool else _aten.maximum.default
    return edit.call(larger, node, node, like=node, before=output)


def _set_outputs(edit: Editor, nodes: Sequence[fx.Node], spec: Any = None) -> None:
    """Let a graph give these values, as a flat list or in a structure with as many leaves."""
    gm = edit.gm
    assert isinstance(gm, CapturedModule)
    (output,) = gm.graph.find_nodes(op="output")
    edit.set_args(output, (tuple(nodes),))
    output.meta.pop("val", None)
    codegen: Any = gm.graph._codegen
    spec = pytree.tree_structure(tuple(nodes)) if spec is None else spec
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)
    gm.recompile()
