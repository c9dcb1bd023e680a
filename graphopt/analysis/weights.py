"""Finding weights by dataflow: constants that reach a compressible op through views and casts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from graphopt.config.selection import ModuleFrame, StateUse
from graphopt.ir import op_info
from graphopt.ir.module_frames import module_frames
from graphopt.ir.op_info import BiasSlot, View, WeightSlot
from graphopt.ir.state import is_state

__all__ = [
    "Source",
    "WeightTensor",
    "find_weights",
    "identity_of",
    "is_decoded",
    "source_of",
    "state_operands",
]

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
            elif key not in parameters and _is_product(node):
                data_like.add(key)
            aliases = [str(constant.target) for constant in constants[key]]
            tensor, frames = _placed(module_frames(node), aliases)
            use = StateUse(tensor, node.name, op_info.op_names(node), role, frames)
            uses.setdefault(key, []).append(use)
            axes.setdefault(key, source.axis)
    weights = []
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
        weights.append(entry)
    return weights


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
    info = op_info.info_of(node)
    if info is None:
        return
    if info.weight_list is not None:
        listed = node.args[info.weight_list]
        for operand in listed if isinstance(listed, list | tuple) else ():
            if isinstance(operand, fx.Node):
                value = operand.meta.get("val")
                role = "weight" if isinstance(value, Tensor) and value.ndim == 2 else "bias"
                yield operand, -1, role, 0
        return
    slots: list[tuple[str, WeightSlot | BiasSlot]] = [("weight", place) for place in info.weights]
    slots += [("bias", bias) for bias in info.biases]
    for role, slot in slots:
        operand = op_info.argument(node, slot.position)
        if isinstance(operand, fx.Node):
            yield operand, slot.position, role, slot.channel_axis


def _is_product(node: fx.Node) -> bool:
    info = op_info.info_of(node)
    return info is not None and info.is_product


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
    """Follow an operand back to the constant it comes from; None where it is none, as state is not."""
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
        elif op_info.view_of(node) is not None:
            place = None if place is None else _axis_before(node, place)
        elif str(node.target) != "<built-in function getitem>":
            return None
        chain.append(node)
        node = node.args[0]
    if is_state(node):
        return None
    rank = _rank(node)
    # where an axis cannot be followed, the first one counts as the output
    known = place is not None and 0 <= place < max(rank, 1)
    axis = place if known and place is not None else 0
    return Source(node, axis, compressed, tuple(reversed(chain)), sparse)


def is_decoded(node: fx.Node) -> bool:
    """Whether a node decodes a compressed weight."""
    return str(node.target).rpartition(".")[0] in _LOOKUPS


def is_with_outliers(node: fx.Node) -> bool:
    """Whether a node adds sparse outliers to a weight from tables."""
    info = op_info.info_of(node)
    if info is None or not info.sums or len(node.args) < 2:
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
    rank, view = len(source), op_info.view_of(node)

    def argument(position: int) -> int:
        value = node.args[position]
        return int(value) if isinstance(value, int) else 0

    if not source or axis >= len(result):
        return None
    if view is View.PERMUTE:
        order = node.args[1]
        return int(order[axis]) % rank  # type: ignore[index,arg-type]
    if view is View.TRANSPOSE:
        first, second = argument(1) % rank, argument(2) % rank
        return {first: second, second: first}.get(axis, axis)
    if view is View.REVERSE:
        return rank - 1 - axis
    if view is View.UNSQUEEZE:
        new = argument(1) % (rank + 1)
        return None if axis == new else axis - (axis > new)
    if view is View.SELECT:
        gone = argument(1) % rank
        return axis + (axis >= gone)
    if view is View.EXPAND:
        shifted = axis - (len(result) - rank)
        return shifted if shifted >= 0 else None
    if source == result or (rank == len(result) and view is not View.RESHAPE):
        return axis
    return _same_extent(source, result, axis)


def _same_extent(source: tuple[int, ...], result: tuple[int, ...], axis: int) -> int | None:
    """The input axis of equal size and equal stride in row-major order."""
    behind = math.prod(result[axis + 1 :])
    for place, size in enumerate(source):
        if size == result[axis] and math.prod(source[place + 1 :]) == behind:
            return place
    return None
