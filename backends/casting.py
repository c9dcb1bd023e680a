"""16-bit casting of exported programs: fp32 → fp16 and int32/int64 → int16, with guards."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from graphopt.backends.precision import (
    FLOAT16_MAX,
    float32_nodes,
    overflowing_values,
    stored_tensor,
)
from graphopt.ir import op_info
from graphopt.ir.torch_private import OpOverload, OpOverloadPacket

__all__ = [
    "cast_fp32_to_fp16",
    "cast_int32_to_int16",
    "cast_to_16_bit_precision",
    "op_predicate",
]

_log = logging.getLogger(__name__)
_Ignored = Iterable[Any] | Callable[[fx.Node], bool] | None
_to_copy = torch.ops.aten._to_copy.default


def cast_to_16_bit_precision(
    exported_program: ExportedProgram,
    ignored_ops: _Ignored = None,
    calibration_data: Iterable[Any] | None = None,
) -> ExportedProgram:
    """Cast an exported program to 16 bits, in place; see the two casts below.

    Args:
        exported_program: After `run_decompositions`.
        ignored_ops: Ops (or a predicate on nodes) that keep computing in fp32.
        calibration_data: Inputs of one call each; values that overflow in fp16 on them stay fp32.

    Returns:
        The same program.

    Examples:
        >>> exported = torch.export.export(model, example).run_decompositions({})
        >>> _ = cast_to_16_bit_precision(exported)
        >>> {tensor.dtype for tensor in exported.state_dict.values()}
        {torch.float16}
    """
    cast_fp32_to_fp16(exported_program, ignored_ops, calibration_data)
    cast_int32_to_int16(exported_program)
    return exported_program


def cast_fp32_to_fp16(
    exported_program: ExportedProgram,
    ignored_ops: _Ignored = None,
    calibration_data: Iterable[Any] | None = None,
) -> ExportedProgram:
    """Cast float32 inputs, weights and computations to float16, in place.

    Constants that float16 cannot hold (a finite magnitude above 65504, or so small that more than
    half of the non-zero elements would vanish) stay float32, and so do the ops that read them; they
    are reported in a warning of the logger. Numbers beyond the range that ops fill in, such as the
    −3.4e38 of attention masks, become the largest float16 of their sign. Neighbours that stay
    float32 hand their values on as they are; a cast stands only where float16 begins.

    Args:
        exported_program: After `run_decompositions`.
        ignored_ops: Ops (or a predicate on nodes) that keep computing in fp32.
        calibration_data: Inputs of one call each: a tensor, a tuple or list of positional ones, or
            a dict of keyword ones. Values that overflow in fp16 on them stay fp32, inputs and
            outputs too, and so do the ops that read them.

    Returns:
        The same program.

    Raises:
        InputError: A call of the calibration data does not fit the program.

    Examples:
        >>> exported = torch.export.export(model, example).run_decompositions({})
        >>> _ = cast_fp32_to_fp16(exported)
        >>> {tensor.dtype for tensor in exported.state_dict.values()}
        {torch.float16}
    """
    program = exported_program
    graph = program.graph_module.graph
    _drop_type_assertions(graph)
    overflowing = overflowing_values(program, calibration_data or ())
    wide = float32_nodes(graph, op_predicate(ignored_ops), overflowing)
    stored = _stored_names(program)
    for node in graph.nodes:
        if node.op != "placeholder" or node in overflowing:
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype is not torch.float32:
            continue
        name = stored.get(node.name)
        if name is not None and not _narrow_constant(program, name):
            continue
        node.meta["val"] = value.to(torch.float16)
    _propagate(program, wide, overflowing)
    program.graph_module.recompile()
    _refresh_example(program)
    return program


def _narrow_constant(program: ExportedProgram, name: str) -> bool:
    """Store a constant in float16, if that can hold it."""
    tensor = stored_tensor(program, name)
    lowest = torch.finfo(tensor.dtype).min
    tensor = torch.where(tensor == lowest, -FLOAT16_MAX, tensor)
    reason = _unfit(tensor)
    if reason:
        _log.warning("%s stays float32: %s", name, reason)
        return False
    _set_stored(program, name, tensor.to(torch.float16))
    return True


def cast_int32_to_int16(exported_program: ExportedProgram) -> ExportedProgram:
    """Cast integer constants whose values fit from int32/int64 to int16, in place.

    Only constants are narrowed, and only where every consumer accepts int16 (gathers and index
    arithmetic keep their width: torch refuses int16 indices). Inputs keep their type.

    Args:
        exported_program: After `run_decompositions`.

    Returns:
        The same program.

    Examples:
        >>> class Shifted(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("steps", torch.arange(16))
        ...
        ...     def forward(self, x):
        ...         return x + self.steps.to(x.dtype)
        >>> exported = torch.export.export(Shifted(), example).run_decompositions({})
        >>> _ = cast_int32_to_int16(exported)
        >>> exported.state_dict["steps"].dtype
        torch.int16
    """
    program = exported_program
    graph = program.graph_module.graph
    _drop_type_assertions(graph)
    stored = _stored_names(program)
    limits = torch.iinfo(torch.int16)
    for node in graph.nodes:
        value = node.meta.get("val")
        name = stored.get(node.name) if node.op == "placeholder" else None
        if name is None or not isinstance(value, Tensor):
            continue
        if value.dtype not in (torch.int32, torch.int64) or not node.users:
            continue
        tensor = stored_tensor(program, name)
        fits = tensor.numel() == 0 or (tensor.min() >= limits.min and tensor.max() <= limits.max)
        if not fits or not all(_casts_only(user) for user in node.users):
            continue
        _set_stored(program, name, tensor.to(torch.int16))
        node.meta["val"] = value.to(torch.int16)
    return program


def _drop_type_assertions(graph: fx.Graph) -> None:
    """Remove the checks that tracing left behind; the types they check are about to change."""
    for node in list(graph.nodes):
        info = op_info.info_of(node)
        if info is not None and info.check == "type":
            graph.erase_node(node)


def _casts_only(node: fx.Node) -> bool:
    """Whether an op reads its operand only to convert it to another type."""
    return op_info.cast_type(node) is not None


def op_predicate(ignored: _Ignored) -> Callable[[fx.Node], bool]:
    """Which nodes `ignored` means.

    Args:
        ignored: An op, several, or a predicate on nodes; None for no op.
    """
    if ignored is None:
        return lambda node: False
    if isinstance(ignored, OpOverload | OpOverloadPacket):
        ignored = [ignored]
    if callable(ignored):
        return ignored
    chosen = set(ignored)
    return lambda node: (
        node.target in chosen or (getattr(node.target, "overloadpacket", None) in chosen)
    )


def _stored_names(program: ExportedProgram) -> dict[str, str]:
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    return {
        spec.arg.name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind in kinds and spec.target is not None
    }


def _set_stored(program: ExportedProgram, name: str, value: Tensor) -> None:
    if name in program.state_dict:
        old = program.state_dict[name]
        if isinstance(old, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=False)
        program.state_dict[name] = value
    if name in program.constants:
        program.constants[name] = value


def _unfit(tensor: Tensor) -> str:
    """Why float16 cannot hold a constant, or ""."""
    finite = tensor[torch.isfinite(tensor)].abs()
    if finite.numel() == 0:
        return ""
    largest = float(finite.detach().max())
    if largest > FLOAT16_MAX:
        return f"magnitude {largest:.3g} exceeds 65504"
    nonzero = finite[finite > 0]
    if nonzero.numel() and float((nonzero.to(torch.float16) == 0).float().mean()) > 0.5:
        return f"most of its elements (largest {largest:.3g}) would become zero"
    return ""


def _propagate(program: ExportedProgram, wide: set[fx.Node], overflowing: set[fx.Node]) -> None:
    """Recompute every value in float16, with casts where float32 has to meet it."""
    graph = program.graph_module.graph
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "output":
            _narrow_results(program, node, overflowing)
        if node.op != "call_function":
            continue
        if node not in wide:
            _narrow_arguments(node)
        operands = [n for n in node.all_input_nodes if _is_float(n)]
        constant = any(_is_wide_constant(operand) for operand in operands)
        target = torch.float32 if node in wide or constant else torch.float16
        if not op_info.is_cast(node) and not str(node.target).startswith("coreai."):
            for operand in operands:
                if operand.meta["val"].dtype is not target:
                    _cast_operand(node, operand, target, casts)
        node.meta["val"] = _evaluate(node)


def _is_wide_constant(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.meta["val"].dtype is torch.float32


def _narrow_arguments(node: fx.Node) -> None:
    def fitted(value: Any) -> Any:
        if value is torch.float32:
            return torch.float16
        if isinstance(value, float) and FLOAT16_MAX < abs(value) < math.inf:
            return math.copysign(FLOAT16_MAX, value)
        return value

    node.args = torch.utils._pytree.tree_map(fitted, node.args)
    node.kwargs = torch.utils._pytree.tree_map(fitted, node.kwargs)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.float32)


def _cast_operand(
    user: fx.Node,
    operand: fx.Node,
    dtype: torch.dtype,
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node],
) -> None:
    """Let an op read another type of a value; one cast serves all ops behind the first."""
    cast = casts.get((operand, dtype))
    if cast is None:
        with user.graph.inserting_before(user):
            cast = user.graph.call_function(_to_copy, (operand,), {"dtype": dtype})
        cast.meta = {k: v for k, v in user.meta.items() if k in ("nn_module_stack", "stack_trace")}
        cast.meta["val"] = operand.meta["val"].to(dtype)
        casts[operand, dtype] = cast
    user.replace_input_with(operand, cast)


def _narrow_results(program: ExportedProgram, output: fx.Node, overflowing: set[fx.Node]) -> None:
    """Outputs in float16 but for those that overflow, and new values of state in its type."""
    graph, signature = program.graph_module.graph, program.graph_signature
    types = {
        str(spec.target): graph_input.meta["val"].dtype
        for spec, graph_input in zip(
            signature.input_specs, graph.find_nodes(op="placeholder"), strict=True
        )
        if spec.target is not None and _is_float(graph_input)
    }
    results = list(output.args[0])  # type: ignore[arg-type]
    for place, (spec, result) in enumerate(zip(signature.output_specs, results, strict=True)):
        if not isinstance(result, fx.Node) or not _is_float(result):
            continue
        dtype = types.get(str(spec.target), torch.float16)
        if result.meta["val"].dtype is dtype or result in overflowing:
            continue
        with graph.inserting_before(output):
            results[place] = graph.call_function(_to_copy, (result,), {"dtype": dtype})
        results[place].meta["val"] = result.meta["val"].to(dtype)
        spec.arg.name = results[place].name
    output.args = (tuple(results),)


def _evaluate(node: fx.Node) -> Any:
    def value(used: fx.Node) -> Any:
        return used.meta["val"]

    args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
    mode = next(
        (
            n.meta["val"].fake_mode
            for n in node.graph.nodes
            if hasattr(n.meta.get("val"), "fake_mode")
        ),
        None,
    )
    assert callable(node.target)
    if mode is None:
        return node.target(*args, **kwargs)
    with mode:
        return node.target(*args, **kwargs)


def _refresh_example(program: ExportedProgram) -> None:
    if program.example_inputs is None:
        return
    flat, spec = torch.utils._pytree.tree_flatten(program.example_inputs)
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph_module.graph.find_nodes(op="placeholder")}
    cast = [
        leaf.to(nodes[name].meta["val"].dtype)
        if isinstance(leaf, Tensor) and isinstance(name, str) and leaf.is_floating_point()
        else leaf
        for leaf, name in zip(flat, names, strict=True)
    ]
    program.example_inputs = torch.utils._pytree.tree_unflatten(cast, spec)
