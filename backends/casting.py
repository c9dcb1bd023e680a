"""16-bit casting of exported programs: fp32 → fp16 and int32/int64 → int16, with guards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from graphopt.errors import InputError
from graphopt.ir import op_info

__all__ = ["cast_fp32_to_fp16", "cast_int32_to_int16", "cast_to_16_bit_precision"]

_log = logging.getLogger(__name__)
_FP16_MAX = float(torch.finfo(torch.float16).max)
_Ignored = Iterable[Any] | Callable[[fx.Node], bool] | None
_to_copy = torch.ops.aten._to_copy.default


def cast_to_16_bit_precision(
    exported_program: ExportedProgram, ignored_ops: _Ignored = None
) -> ExportedProgram:
    """Cast an exported program to 16 bits, in place; see the two casts below.

    Args:
        exported_program: After `run_decompositions`.
        ignored_ops: Ops (or a predicate on nodes) that keep computing in fp32.

    Returns:
        The same program.
    """
    cast_fp32_to_fp16(exported_program, ignored_ops)
    cast_int32_to_int16(exported_program)
    return exported_program


def cast_fp32_to_fp16(
    exported_program: ExportedProgram, ignored_ops: _Ignored = None
) -> ExportedProgram:
    """Cast float32 inputs, weights and computations to float16, in place.

    Constants that float16 cannot hold (a finite magnitude above 65504, or so small that more than
    half of the non-zero elements would vanish) stay float32, and so do the ops that read them; they
    are reported in a warning of the logger. Scalar arguments beyond the range, such as the −3.4e38
    of attention masks, become the largest float16 of their sign.

    Args:
        exported_program: After `run_decompositions`.
        ignored_ops: Ops (or a predicate on nodes) that keep computing in fp32.

    Returns:
        The same program.
    """
    keep = _predicate(ignored_ops)
    program = exported_program
    kept: set[str] = set()
    graph = program.graph_module.graph
    _drop_type_assertions(graph)
    stored = _stored_names(program)
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype is not torch.float32:
            continue
        name = stored.get(node.name)
        if name is not None:
            tensor = _stored_value(program, name)
            reason = _unfit(tensor)
            if reason:
                kept.add(node.name)
                _log.warning("%s stays float32: %s", name, reason)
                continue
            _set_stored(program, name, tensor.to(torch.float16))
        node.meta["val"] = value.to(torch.float16)
    _propagate(graph, keep, torch.float16)
    program.graph_module.recompile()
    _refresh_example(program, torch.float32, torch.float16)
    return program


def cast_int32_to_int16(exported_program: ExportedProgram) -> ExportedProgram:
    """Cast integer constants whose values fit from int32/int64 to int16, in place.

    Only constants are narrowed, and only where every consumer accepts int16 (gathers and index
    arithmetic keep their width: torch refuses int16 indices). Inputs keep their type.

    Args:
        exported_program: After `run_decompositions`.

    Returns:
        The same program.
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
        tensor = _stored_value(program, name)
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


def _predicate(ignored: _Ignored) -> Callable[[fx.Node], bool]:
    if ignored is None:
        return lambda node: False
    if isinstance(ignored, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
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


def _stored_value(program: ExportedProgram, name: str) -> Tensor:
    tensor = program.state_dict.get(name, program.constants.get(name))
    if not isinstance(tensor, Tensor):
        raise InputError(f"the program holds no tensor {name!r}")
    return tensor


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
    largest = float(finite.max())
    if largest > _FP16_MAX:
        return f"magnitude {largest:.3g} exceeds 65504"
    nonzero = finite[finite > 0]
    if nonzero.numel() and float((nonzero.to(torch.float16) == 0).float().mean()) > 0.5:
        return f"most of its elements (largest {largest:.3g}) would become zero"
    return ""


def _propagate(graph: fx.Graph, keep: Callable[[fx.Node], bool], narrow: torch.dtype) -> None:
    """Recompute every value in float16, with casts where float32 has to meet it."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        wide = keep(node)
        if not wide:
            _narrow_arguments(node, narrow)
        operands = [n for n in node.all_input_nodes if _is_float(n)]
        stays_wide = wide or any(n.meta["val"].dtype is torch.float32 for n in operands)
        target = torch.float32 if stays_wide else narrow
        converts = op_info.is_cast(node) or str(node.target).startswith("coreai.")
        if not converts:
            for operand in operands:
                if operand.meta["val"].dtype not in (target, torch.float64):
                    _insert_cast(graph, node, operand, target)
        node.meta["val"] = _evaluate(node)
        if stays_wide and _is_float(node) and not converts and not _has_tuple(node):
            _narrow_result(graph, node, narrow)


def _narrow_arguments(node: fx.Node, narrow: torch.dtype) -> None:
    def fitted(value: Any) -> Any:
        if value is torch.float32:
            return narrow
        if isinstance(value, float) and abs(value) > _FP16_MAX and abs(value) != float("inf"):
            return _FP16_MAX if value > 0 else -_FP16_MAX
        return value

    node.args = torch.utils._pytree.tree_map(fitted, node.args)
    node.kwargs = torch.utils._pytree.tree_map(fitted, node.kwargs)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.float32)


def _has_tuple(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), Tensor)


def _insert_cast(graph: fx.Graph, user: fx.Node, operand: fx.Node, dtype: torch.dtype) -> None:
    with graph.inserting_before(user):
        cast = graph.call_function(_to_copy, (operand,), {"dtype": dtype})
    cast.meta = {k: v for k, v in user.meta.items() if k in ("nn_module_stack", "stack_trace")}
    cast.meta["val"] = operand.meta["val"].to(dtype)
    user.replace_input_with(operand, cast)


def _narrow_result(graph: fx.Graph, node: fx.Node, narrow: torch.dtype) -> None:
    with graph.inserting_after(node):
        cast = graph.call_function(_to_copy, (node,), {"dtype": narrow})
    cast.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    cast.meta["val"] = node.meta["val"].to(narrow)
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)


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


def _refresh_example(program: ExportedProgram, wide: torch.dtype, narrow: torch.dtype) -> None:
    if program.example_inputs is None:
        return

    def cast(value: Any) -> Any:
        return value.to(narrow) if isinstance(value, Tensor) and value.dtype is wide else value

    program.example_inputs = torch.utils._pytree.tree_map(cast, program.example_inputs)
