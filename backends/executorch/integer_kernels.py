"""Which ops XNNPACK computes with the integers of their weights, and what those integers are."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphopt.analysis.stored_values import QuantizedTensor, quantized_at
from graphopt.backends.executorch.dynamic import reads_rows_by_range
from graphopt.backends.executorch.kernels import (
    EMBEDDINGS,
    LINEAR,
    is_fused_activation,
    takes_integers,
)
from graphopt.ir import op_info
from graphopt.ir.captured_module import holder_of
from graphopt.ir.op_info import WeightSlot
from graphopt.ir.ops import STORAGE_BITS

__all__ = [
    "DEQUANTIZE",
    "PACKED",
    "QUANTIZE",
    "TAKES_ROWS",
    "ZEROS",
    "computes_with_integers",
    "elements_of",
    "is_float32",
    "is_packed",
    "is_rounded",
    "kernel_bits",
    "only_user",
    "weight_slot",
    "why_no_kernel",
    "why_not_integers",
    "with_float_results",
]

_ours = torch.ops.graphopt
QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"
# ops whose weight may be computed when the program runs
TAKES_ROWS = LINEAR | EMBEDDINGS
ZEROS = "_kernel_zeros"  # what zero points that are 0 are called
NARROW = 4  # bits of the integers that linear layers take two to a byte
_BLOCK = 32  # elements that share a scale in their kernels, or a multiple of it
PACKED = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (2, 3, 4, 6, 8))


def is_packed(weight: fx.Node, *, tightly: bool = False, kernels: bool = True) -> bool:
    """Whether codes of a `shift_scale` weight are smaller than what XNNPACK can hold of it.

    Weights that kernels compute with stay integers, and so do those of eight bits whose rows are
    dequantized when the program runs; integers of a table are decoded with it.

    Args:
        weight: The node.
        tightly: Pack those, too, that a kernel holds in a wider type.
        kernels: Whether the target has XNNPACK's kernels of integers beside floats.
    """
    held = quantized_at(weight)
    if held is None:
        return False
    bits = STORAGE_BITS[held.storage]
    for reader in weight.users:
        if not kernels and reader.target in LINEAR and not computes_with_integers(reader):
            continue
        if not why_no_kernel(held, reader) and not (tightly and kernel_bits(held, reader) > bits):
            return False
    return bits < 8 or any(reader.target not in TAKES_ROWS for reader in weight.users)


def kernel_bits(weight: QuantizedTensor, reader: fx.Node) -> int:
    """Width of the integers that a kernel takes of a weight."""
    narrow = STORAGE_BITS[weight.storage] <= NARROW and weight.shape[-1] % 2 == 0
    return NARROW if narrow and not computes_with_integers(reader) else 8


def is_rounded(node: object) -> bool:
    """Whether a value is a dequantized activation."""
    if not isinstance(node, fx.Node) or str(node.target) != DEQUANTIZE:
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and source.op != "get_attr"


def with_float_results(gm: fx.GraphModule) -> list[str]:
    """Linear layers with integer weights that read rounded values and give floats."""
    return [
        node.name
        for node in gm.graph.nodes
        if node.target in LINEAR
        and is_rounded(node.args[0])
        and "dequantize_per_" in str(getattr(node.args[1], "target", ""))
        and not computes_with_integers(node)
    ]


def only_user(node: fx.Node) -> fx.Node | None:
    """The one reader of a value, or None where there are several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def why_not_integers(weight: fx.Node, reader: fx.Node) -> str:
    """Why XNNPACK has no kernel for an op with the integers of its weight, or "".

    Its linear layers take floats beside them. Convolutions need integers before and behind.
    """
    if not takes_integers(reader):
        return f"{str(reader.target).split('.')[1]} takes float weights"
    slot = weight_slot(reader)
    if reader.args[slot.position] is not weight:
        return "it is no weight operand"
    if reader.target in LINEAR or computes_with_integers(reader):
        return ""
    if not is_rounded(_unpadded(reader)):
        return "its op reads a float activation"
    return "its op's output is not quantized"


def computes_with_integers(reader: fx.Node) -> bool:
    """Whether the data of an op and its result are integers with known scales."""
    if not is_rounded(_unpadded(reader)):
        return False
    result: fx.Node | None = reader
    user = only_user(reader)
    if user is not None and is_fused_activation(user):
        result = user
    behind = None if result is None else only_user(result)
    return behind is not None and str(behind.target) == QUANTIZE


def _unpadded(reader: fx.Node) -> object:
    x = reader.args[weight_slot(reader).data]
    padded = op_info.info_of(x) if isinstance(x, fx.Node) else None
    return x.args[0] if padded is not None and padded.fill is not None else x  # type: ignore[union-attr]


def why_no_kernel(weight: QuantizedTensor, reader: fx.Node) -> str:
    """Why XNNPACK cannot compute with the integers themselves, or ""."""
    reason = why_not_integers(weight.node, reader)
    if reason:
        return reason
    if reader.target in LINEAR and not computes_with_integers(reader) and not is_float32(weight):
        return "its scales give 16-bit floats"
    if not weight.per_channel:
        reason = _why_no_blocks(weight, reader)
        if reason:
            return reason
    else:
        axes = [axis for axis, count in enumerate(weight.counts) if count > 1]
        if axes and axes != [weight_slot(reader).channel_axis]:
            return f"scales run along axis {axes[0]}"
        if axes and _is_transposed_in_groups(reader):
            return "a transposed convolution in groups has one scale"
    if weight.offset == "minimum" or bool(elements_of(weight)[2].any()):
        return "weights have zero points"
    return ""


def _why_no_blocks(weight: QuantizedTensor, reader: fx.Node) -> str:
    """Why XNNPACK has no kernel for scales over blocks, or ""."""
    if reader.target not in LINEAR or not reads_rows_by_range(reader):
        return "scales run over blocks, beside data that are not rounded with a scale per row"
    (rows, inputs), (groups, blocks) = weight.shape, weight.counts
    if STORAGE_BITS[weight.storage] > NARROW or groups != rows or inputs // blocks % _BLOCK:
        return f"its blocks are no {_BLOCK} int4 of a row, or a multiple of it"
    scale = elements_of(weight)[1]
    if not bool((scale.to(torch.bfloat16).to(torch.float32) == scale).all()):
        return "scales of blocks are no bfloat16; set scale_dtype='bfloat16'"
    return ""


def elements_of(weight: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Elements as int8 with the weight's shape; scale and zero point, shape `counts`."""
    data, scale, offset, storage, shape, _ = weight.node.args
    assert isinstance(data, fx.Node)
    ones = torch.ones([1] * len(weight.shape))
    stored = _ours.shift_scale.default(_value(data), ones, None, storage, shape, torch.float32)
    zero = torch.zeros(weight.counts)
    if isinstance(offset, fx.Node):
        zero = _value(offset).to(torch.float32)
    if str(storage).startswith("u"):
        middle = 2 ** (STORAGE_BITS[str(storage)] - 1)
        stored, zero = stored - middle, zero - middle
    assert isinstance(scale, fx.Node)
    return stored.to(torch.int8), _value(scale).to(torch.float32), zero


def weight_slot(op: fx.Node) -> WeightSlot:
    """Places of the operands of an op with a weight."""
    info = op_info.info_of(op)
    assert info is not None
    return info.weights[0]


def _is_transposed_in_groups(op: fx.Node) -> bool:
    info = op_info.info_of(op)
    places = None if info is None else info.convolution
    if places is None or not places.transposed:
        return False
    return bool(op_info.argument(op, places.groups, 1) != 1)


def is_float32(weight: QuantizedTensor) -> bool:
    """Whether a weight is dequantized to float32."""
    value = weight.node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _value(constant: fx.Node) -> Tensor:
    module = constant.graph.owning_module
    assert module is not None
    holder, name = holder_of(module, str(constant.target))
    value = getattr(holder, name)
    assert isinstance(value, Tensor)
    return value
