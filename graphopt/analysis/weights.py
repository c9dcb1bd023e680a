"""Finding weights by dataflow: constants that reach a compressible op through views and casts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.config.selection import ModuleFrame, StateUse
from graphopt.ir.module_frames import module_frames

__all__ = [
    "Source",
    "WeightTensor",
    "find_weights",
    "identity_of",
    "op_names",
    "source_of",
    "state_operands",
]

_aten = torch.ops.aten
_Slot = tuple[int, str, int]  # (argument, role, output-channel axis of the operand)

# op → (names in configs, slots); an axis of -1 is the operand's last
_OPS: dict[object, tuple[tuple[str, ...], tuple[_Slot, ...]]] = {}


def _register(names: tuple[str, ...], overloads: list[str], slots: tuple[_Slot, ...]) -> None:
    for overload in overloads:
        packet, _, kind = overload.partition(".")
        found = getattr(getattr(_aten, packet, None), kind or "default", None)
        if found is not None:
            _OPS[found] = ((*names, packet), slots)


_WEIGHT_BIAS: tuple[_Slot, ...] = ((1, "weight", 0), (2, "bias", 0))
for _ndim in (1, 2, 3):
    _conv, _transposed = f"conv{_ndim}d", f"conv_transpose{_ndim}d"
    _register((_conv,), [f"{_conv}.default", f"{_conv}.padding"], _WEIGHT_BIAS)
    _overload = "default" if _ndim == 1 else "input"
    _register((_transposed,), [f"{_transposed}.{_overload}"], ((1, "weight", 1), (2, "bias", 0)))
_register(("conv_transpose1d",), ["conv_transpose1d.default"], ((1, "weight", 1), (2, "bias", 0)))
_register(("linear",), ["linear.default"], _WEIGHT_BIAS)
_register(("embedding",), ["embedding.default"], ((0, "weight", 0),))
_register(
    ("matmul",),
    ["matmul.default", "mm.default", "bmm.default"],
    ((0, "weight", -2), (1, "weight", -1)),
)
_register(("addmm",), ["addmm.default"], ((1, "weight", -2), (2, "weight", -1), (0, "bias", -1)))
_register(("baddbmm",), ["baddbmm.default"], ((1, "weight", -2), (2, "weight", -1)))

_RECURRENT = {getattr(_aten, name).input: name for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
_CONVOLUTION = _aten.convolution.default

_PERMUTING = {_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.numpy_T.default}
_PRESERVING = {
    *(
        _aten.view.default,
        _aten.reshape.default,
        _aten._unsafe_view.default,
        _aten.unsqueeze.default,
    ),
    *(_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.expand.default),
    *(_aten.contiguous.default, _aten.clone.default, _aten.alias.default, _aten.detach.default),
    *(_aten._to_copy.default, _aten.to.dtype, _aten.to.dtype_layout, _aten.to.device),
    *(_aten.slice.Tensor, _aten.select.int, _aten.split.Tensor, _aten.split_with_sizes.default),
    *(
        _aten.chunk.default,
        _aten.flatten.using_ints,
        _aten.unflatten.int,
        _aten.lift_fresh_copy.default,
    ),
}
_RESHAPING = {
    *(_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default),
    *(_aten.flatten.using_ints, _aten.unflatten.int, _aten.squeeze.default),
    *(_aten.squeeze.dim, _aten.squeeze.dims),
}
_SPARSE = ("graphopt.sparse_to_dense",)
_LOOKUPS = (
    "graphopt.lut_to_dense",
    "graphopt.shift_scale",
    *_SPARSE,
    "quantized_decomposed.dequantize_per_tensor",
    "quantized_decomposed.dequantize_per_channel",
)


@dataclass(frozen=True)
class Source:
    """Where an operand comes from.

    Attributes:
        node: The `get_attr` node of the stored tensor.
        axis: Output-channel axis of the stored tensor.
        compressed: Whether a lookup or dequantize op lies on the way.
        sparse: The op on the way that puts values into a dense weight.
        chain: The views and casts on the way, from the stored tensor to the operand.
    """

    node: fx.Node
    axis: int
    compressed: bool = False
    chain: tuple[fx.Node, ...] = ()
    sparse: fx.Node | None = None


@dataclass(frozen=True)
class WeightTensor:
    """A constant of the program and the ops that use it as state.

    Attributes:
        name: Its dotted name, the first of all that share the tensor.
        aliases: Other names of the same tensor.
        nodes: The `get_attr` nodes of all names.
        tensor: Its value.
        is_parameter: Whether the model trains it.
        uses: Compressible uses in the order of the graph.
        output_axis: Output-channel axis of the stored tensor at the first use.
        other_users: Types of ops that use it otherwise.
        compressed: Whether a lookup or dequantize op produces it already.
        sparse: The op that puts the values into a dense weight, where the tensor holds only those
            that are not zero, [values].
        data_like: Whether it is an operand of a matmul that the model does not train, such as a
            mask or a table of angles; such a tensor is compressed only when named.
    """

    name: str
    aliases: tuple[str, ...]
    nodes: tuple[fx.Node, ...]
    tensor: Tensor
    is_parameter: bool
    uses: tuple[StateUse, ...]
    output_axis: int
    other_users: tuple[str, ...]
    compressed: bool = False
    data_like: bool = False
    sparse: fx.Node | None = None

    @property
    def module_type(self) -> str:
        """Class name of the module around the first use."""
        types = [frame.type for frame in self.uses[0].frames if frame.type] if self.uses else []
        return types[-1].rpartition(".")[2] if types else ""


def identity_of(weight: WeightTensor) -> dict[str, Any]:
    """Which tensor a row of the report is about: the fields of a `TensorRecord` that say so."""
    return {
        "name": weight.name,
        "aliases": weight.aliases,
        "module_type": weight.module_type,
        "ops": tuple(dict.fromkeys(use.op_types[0] for use in weight.uses)),
        "nodes": tuple(use.node for use in weight.uses),
        "shape": tuple(weight.tensor.shape),
        "dtype": str(weight.tensor.dtype).removeprefix("torch."),
    }


def find_weights(gm: fx.GraphModule) -> list[WeightTensor]:
    """All state tensors of compressible ops, and parameters of rank 2 or more that have none.

    Tied names (one tensor under several, or one used by several ops) are one entry.
    """
    constants: dict[int, list[fx.Node]] = {}
    values: dict[int, Tensor] = {}
    parameters = {id(parameter) for parameter in gm.parameters()}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = _attribute(gm, str(node.target))
        if isinstance(value, Tensor):
            constants.setdefault(id(value), []).append(node)
            values[id(value)] = value
    owners = {node: key for key, nodes in constants.items() for node in nodes}
    uses: dict[int, list[StateUse]] = {}
    axes: dict[int, int] = {}
    compressed: set[int] = set()
    data_like: set[int] = set()
    sparse: dict[int, fx.Node] = {}
    for node in gm.graph.nodes:
        for operand, _, role, axis in state_operands(node):
            source = source_of(operand, axis)
            key = None if source is None else owners.get(source.node)
            if source is None or key is None:
                continue
            if source.sparse is not None:
                sparse[key] = source.sparse
            if source.compressed:
                compressed.add(key)
            elif key not in parameters and _is_matmul(node):
                data_like.add(key)
            aliases = [str(constant.target) for constant in constants[key]]
            tensor, frames = _placed(module_frames(node), aliases)
            use = StateUse(tensor, node.name, op_names(node), role, frames)
            uses.setdefault(key, []).append(use)
            axes.setdefault(key, source.axis)
    found = []
    for key, nodes in constants.items():
        value = values[key]
        orphan = key in parameters and value.ndim >= 2
        if key not in uses and not orphan:
            continue
        targets = list(dict.fromkeys(str(node.target) for node in nodes))
        others = sorted({_short(user) for node in nodes for user in node.users})
        entry = WeightTensor(
            targets[0],
            tuple(targets[1:]),
            tuple(nodes),
            value,
            key in parameters,
            tuple(uses.get(key, ())),
            axes.get(key, 0),
            tuple(others),
            key in compressed,
            key in data_like,
            sparse.get(key),
        )
        found.append(entry)
    return found


def _attribute(gm: fx.GraphModule, path: str) -> object:
    value: object = gm
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def state_operands(node: fx.Node) -> Iterator[tuple[fx.Node, int, str, int]]:
    """Operands that an op takes its state from: node, position, role, output-channel axis.

    The position is -1 for ops that take a list of weights.
    """
    if node.op != "call_function":
        return
    if node.target in _RECURRENT:
        for operand in node.args[2] if isinstance(node.args[2], list | tuple) else ():
            if isinstance(operand, fx.Node):
                value = operand.meta.get("val")
                role = "weight" if isinstance(value, Tensor) and value.ndim == 2 else "bias"
                yield operand, -1, role, 0
        return
    slots: tuple[_Slot, ...] = ()
    if node.target is _CONVOLUTION:
        slots = ((1, "weight", 1 if node.args[6] else 0), (2, "bias", 0))
    elif node.target in _OPS:
        slots = _OPS[node.target][1]
    for position, role, axis in slots:
        if position < len(node.args) and isinstance(operand := node.args[position], fx.Node):
            yield operand, position, role, axis


def _is_matmul(node: fx.Node) -> bool:
    return node.target in _OPS and _OPS[node.target][1][0][2] == -2


def op_names(node: fx.Node) -> tuple[str, ...]:
    """What configs call an op: its family, the op itself, and its overload."""
    full = str(node.target)
    if node.target in _RECURRENT:
        return (_RECURRENT[node.target], full)
    if node.target is _CONVOLUTION:
        value = node.args[1].meta.get("val") if isinstance(node.args[1], fx.Node) else None
        rank = value.ndim - 2 if isinstance(value, Tensor) else 2
        kind = "conv_transpose" if node.args[6] else "conv"
        return (f"{kind}{rank}d", "convolution", full)
    if node.target not in _OPS:
        return (_short(node), full)
    names = _OPS[node.target][0]
    if node.target in (_aten.mm.default, _aten.addmm.default) and _turned(node.args[-1]):
        # what decompositions make of a linear layer
        names = ("linear", *names)
    return tuple(dict.fromkeys((*names, full)))


def _turned(operand: object) -> bool:
    return isinstance(operand, fx.Node) and operand.target in (
        *(_aten.t.default, _aten.transpose.int, _aten.permute.default),
    )


def _short(node: fx.Node) -> str:
    return str(node.target).split(".")[1] if "." in str(node.target) else str(node.target)


def _placed(
    frames: tuple[ModuleFrame, ...], aliases: list[str]
) -> tuple[str, tuple[ModuleFrame, ...]]:
    """The tensor's name and the modules around a use.

    Of several names the one whose module runs the op counts. Where none does, as for a weight that
    another module reads, the owner of the first name is added as the innermost frame.
    """
    names = {frame.name for frame in frames}
    for alias in aliases:
        if alias.rpartition(".")[0] in names - {""}:
            return alias, frames
    owner = aliases[0].rpartition(".")[0]
    return aliases[0], frames if owner in names else (*frames, ModuleFrame(owner, ""))


def source_of(node: fx.Node, axis: int) -> Source | None:
    """Follow an operand back to the constant it comes from; None where it is no constant."""
    compressed = False
    sparse: fx.Node | None = None
    chain: list[fx.Node] = []
    place: int | None = axis + _rank(node) if axis < 0 else axis
    while node.op != "get_attr":
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        name = str(node.target).rpartition(".")[0]
        if name in _SPARSE:
            sparse = node
        elif name in _LOOKUPS or is_with_outliers(node):
            compressed = True
        elif node.target in _PRESERVING or node.target in _PERMUTING:
            place = None if place is None else _axis_before(node, place)
        elif str(node.target) != "<built-in function getitem>":
            return None
        chain.append(node)
        node = node.args[0]
    rank = _rank(node)
    # where an axis cannot be followed, the first one counts as the output
    known = place is not None and 0 <= place < max(rank, 1)
    axis = place if known and place is not None else 0
    return Source(node, axis, compressed, tuple(reversed(chain)), sparse)


def is_with_outliers(node: fx.Node) -> bool:
    """Whether a node adds sparse outliers to a weight from tables."""
    if node.target is not _aten.add.Tensor or len(node.args) < 2:
        return False
    return str(getattr(node.args[1], "target", "")).rpartition(".")[0] in _SPARSE


def _shape(node: object) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    if not isinstance(value, Tensor):
        return ()
    return tuple(size if isinstance(size, int) else -1 for size in value.shape)


def _rank(node: object) -> int:
    return len(_shape(node))


def _axis_before(node: fx.Node, axis: int) -> int | None:
    """The axis of a view's input that becomes `axis` of its output, None where none does."""
    source, result = _shape(node.args[0]), _shape(node)
    rank, target = len(source), node.target

    def argument(position: int) -> int:
        value = node.args[position]
        return int(value) if isinstance(value, int) else 0

    if not source or axis >= len(result):
        return None
    if target is _aten.permute.default:
        order = node.args[1]
        return int(order[axis]) % rank  # type: ignore[index,arg-type]
    if target is _aten.transpose.int:
        first, second = argument(1) % rank, argument(2) % rank
        return {first: second, second: first}.get(axis, axis)
    if target in (_aten.t.default, _aten.numpy_T.default):
        return rank - 1 - axis
    if target is _aten.unsqueeze.default:
        new = argument(1) % (rank + 1)
        return None if axis == new else axis - (axis > new)
    if target is _aten.select.int:
        gone = argument(1) % rank
        return axis + (axis >= gone)
    if target is _aten.expand.default:
        shifted = axis - (len(result) - rank)
        return shifted if shifted >= 0 else None
    if source == result or (rank == len(result) and target not in _RESHAPING):
        return axis
    return _same_extent(source, result, axis)


def _same_extent(source: tuple[int, ...], result: tuple[int, ...], axis: int) -> int | None:
    """The input axis of equal size and equal stride in row-major order."""
    behind = math.prod(result[axis + 1 :])
    for place, size in enumerate(source):
        if size == result[axis] and math.prod(source[place + 1 :]) == behind:
            return place
    return None
