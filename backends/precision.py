"""Which values of a program float16 cannot hold: what stays in float32 where the rest is narrowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from graphopt.errors import InputError
from graphopt.run.batches import Batch, as_batch
from graphopt.run.interpreter import GraphWalk, Value

__all__ = ["FLOAT16_MAX", "float32_nodes", "overflowing_values", "stored_tensor"]

FLOAT16_MAX = float(torch.finfo(torch.float16).max)


_WIDE = (torch.float32, torch.float64, torch.bfloat16)


def overflowing_values(program: ExportedProgram, calibration_data: Iterable[Any]) -> set[fx.Node]:
    """Nodes whose float32 values float16 cannot hold on any of the calls.

    What an op fills in on purpose, such as the −3.4e38 of attention masks, is clamped in float16 and
    does not count, nor do the values below the range that are computed from it.

    Args:
        program: In float32.
        calibration_data: Inputs of one call each: a tensor, a tuple or list of positional ones, or
            a dict of keyword ones.

    Raises:
        InputError: A call does not fit the program.
    """
    large: set[fx.Node] = set()
    filled = _filled(program)
    run = GraphWalk(program.graph_module)

    def looked_at(node: fx.Node, result: Any) -> Any:
        if node not in large and _is_large(result, below=node not in filled):
            large.add(node)
        return result

    def call(node: fx.Node, value: Value) -> Any:
        return looked_at(node, run.call(node, value))

    placeholders = program.graph_module.graph.find_nodes(op="placeholder")
    with torch.no_grad():
        for inputs in calibration_data:
            flat = _flat_inputs(program, as_batch(inputs))
            values = {
                node: looked_at(node, given) for node, given in zip(placeholders, flat, strict=True)
            }
            run.walk(run.computed, values, last=run.last, call=call)
    return large


def _is_large(result: Any, *, below: bool) -> bool:
    """Whether float32 values are finite and above float16's range, or with `below` on either side of it."""
    for value in pytree.tree_leaves(result):
        if isinstance(value, Tensor) and value.dtype is torch.float32 and value.numel():
            least, most = torch.aminmax(value)
            if most <= FLOAT16_MAX and (not below or least >= -FLOAT16_MAX):
                continue
            large = value.abs() if below else value
            if bool(((large > FLOAT16_MAX) & large.isfinite()).any()):
                return True
    return False


def float32_nodes(
    graph: fx.Graph, keep: Callable[[fx.Node], bool], overflowing: Collection[fx.Node]
) -> set[fx.Node]:
    """Ops that compute in float32: those that are kept, that overflow, or that read what does.

    Args:
        graph: After `run_decompositions`.
        keep: Ops that the user wants in float32.
        overflowing: Nodes whose value float16 cannot hold.
    """
    wide = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        reads = any(operand in overflowing for operand in node.all_input_nodes)
        if keep(node) or node in overflowing or reads:
            wide.add(node)
    return wide


def stored_tensor(program: ExportedProgram, name: str) -> Tensor:
    """A parameter, buffer or constant.

    Raises:
        InputError: There is none of this name.
    """
    tensor = program.state_dict.get(name, program.constants.get(name))
    if not isinstance(tensor, Tensor):
        raise InputError(f"the program holds no tensor {name!r}")
    return tensor


def _filled(program: ExportedProgram) -> set[fx.Node]:
    """Nodes that a number below float16's range is filled into, and what is computed from them."""
    stored = {
        spec.arg.name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT and spec.target is not None
    }
    found: set[fx.Node] = set()
    for node in program.graph_module.graph.nodes:
        numbers = [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if _is_low(leaf)]
        held = None
        if node.op == "placeholder" and node.name in stored:
            held = program.state_dict.get(
                stored[node.name], program.constants.get(stored[node.name])
            )
        low = isinstance(held, Tensor) and held.dtype in _WIDE and _below(held)
        if numbers or low or any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def _is_low(value: object) -> bool:
    return isinstance(value, float) and -math.inf < value < -FLOAT16_MAX


def _below(value: Tensor) -> bool:
    return bool((value < -FLOAT16_MAX).any())


def _flat_inputs(program: ExportedProgram, batch: Batch) -> list[Any]:
    """Values of all placeholders for one call."""
    leaves, spec = pytree.tree_flatten(batch)
    if spec != program.call_spec.in_spec:
        raise InputError(
            f"calibration inputs do not fit the program: {spec}, exported {program.call_spec.in_spec}"
        )
    given = iter(leaves)
    return [
        next(given)
        if item.kind is InputKind.USER_INPUT
        else stored_tensor(program, str(item.target))
        for item in program.graph_signature.input_specs
    ]
