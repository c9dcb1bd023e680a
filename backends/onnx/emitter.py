"""Adding nodes and constants to a graph of onnx_ir."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Emitter", "array_of"]

Array = NDArray[Any]
_NARROW = ("INT4", "UINT4")


def array_of(value: Any) -> Array:
    """What a constant of the graph holds, with floats that numpy lacks as float32."""
    raw = getattr(value.const_value, "raw", None)
    if isinstance(raw, torch.Tensor):
        tensor = raw.detach().cpu()
        exotic = tensor.dtype not in _PLAIN
        return (tensor.to(torch.float32) if exotic else tensor).contiguous().numpy()
    array: Array = value.const_value.numpy()
    return array


_PLAIN = frozenset(
    getattr(torch, name)
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64"),
        *("uint16", "uint32", "uint64", "float16", "float32", "float64"),
    )
)


class Emitter:
    """Puts nodes before one of a graph, and constants beside it, equal small ones once.

    Args:
        graph: It is changed.
    """

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.place: Any = None
        self._known: dict[tuple[Any, ...], Any] = {}
        self._taken = {str(value.name) for node in graph for value in node.outputs}
        self._taken |= {str(value.name) for value in graph.inputs} | set(graph.initializers)

    def name(self, base: str) -> str:
        """A name that no value of the graph has."""
        made, number = base, 0
        while made in self._taken:
            number += 1
            made = f"{base}_{number}"
        self._taken.add(made)
        return made

    def constant(self, array: Array, base: str, kind: str | None = None) -> Any:
        """A constant.

        Args:
            array: Its values; integers of 4 bits one a byte.
            base: What its name begins with.
            kind: Element type as onnx_ir spells it ("INT4", "FLOAT8E4M3FN"); the array's without.
        """
        import onnx_ir as ir

        array = np.asarray(array, order="C")
        key = (array.tobytes(), array.shape, str(array.dtype), kind) if array.size <= 64 else None
        if key is not None and key in self._known:
            return self._known[key]
        name = self.name(base)
        if kind in _NARROW:
            tensor: Any = ir.PackedTensor(
                _nibbles(array), ir.DataType[kind], shape=list(array.shape), name=name
            )
        elif kind is not None and kind.startswith("FLOAT8"):
            stored = array.view(ir.DataType[kind].numpy())
            tensor = ir.Tensor(stored, dtype=ir.DataType[kind], name=name)
        else:
            tensor = ir.Tensor(array, name=name)
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.initializers[name] = value
        if key is not None:
            self._known[key] = value
        return value

    def call(
        self,
        op: str,
        inputs: Sequence[Any],
        like: Any = None,
        *,
        kind: str | None = None,
        shape: Sequence[Any] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """The result of a node that is put before the current place.

        Args:
            op: Its type.
            inputs: Its operands.
            like: A value whose name, type and shape the result has, but for the next two.
            kind: Element type of the result.
            shape: Shape of the result.
            domain: Of the op.
            attributes: Of the node.
        """
        import onnx_ir as ir

        node = ir.node(op, list(inputs), attributes, domain=domain)
        (result,) = node.outputs
        base = str(like.name) if like is not None else str(self.place.outputs[0].name)
        result.name = self.name(f"{base}_{op.lower()}")
        node.name = self.name(f"node_{result.name}")
        if kind is not None:
            result.type = ir.TensorType(ir.DataType[kind])
        elif like is not None:
            result.type = like.type
        if shape is not None:
            result.shape = ir.Shape(shape)
        elif like is not None:
            result.shape = like.shape
        self.graph.insert_before(self.place, node)
        return result

    def replace(self, value: Any, node: Any = None) -> None:
        """Put a value in the place of a node's result, and drop the node.

        Args:
            value: What the readers read from now on.
            node: The current one without.
        """
        import onnx_ir as ir

        node = self.place if node is None else node
        (old,) = node.outputs
        if old.is_graph_output():
            if value.producer() is None or value.is_graph_output():
                value = self.call("Identity", [value], value)
            old.name, value.name = self.name(f"{old.name}_before"), old.name
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        if old.shape is not None:
            value.shape = old.shape
        self.graph.remove(node, safe=True)


def _nibbles(codes: Array) -> Array:
    """Two elements a byte, the first in the low half."""
    flat = codes.reshape(-1).astype(np.uint8) & 15
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    packed: Array = flat[0::2] | (flat[1::2] << 4)
    return packed
