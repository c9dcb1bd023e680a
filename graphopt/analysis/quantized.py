"""Reading what a program holds of quantized weights and activations, for refusals, counts and sizes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

__all__ = [
    "QuantizedActivation",
    "QuantizedTensor",
    "find_quantized_activations",
    "find_quantized_weights",
    "quantized_ops",
]

_ours = torch.ops.graphopt


def quantized_ops() -> Any:
    """The `quantized_decomposed` ops of the ecosystem, which this makes torch register."""
    # a module of torch that is bound to move registers them
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    return torch.ops.quantized_decomposed


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight that a dequantize op produces.

    Attributes:
        name: Name of the weight.
        node: The dequantize op.
        data: Node of the stored elements.
        storage: Element type, as in `graphopt.ops.shift_scale`.
        counts: Blocks along each axis.
        shape: Shape of the weight.
        scale_dtype: Type of the scales.
        offset: "none", "zero_point" or "minimum".
    """

    name: str
    node: fx.Node
    data: fx.Node
    storage: str
    counts: tuple[int, ...]
    shape: tuple[int, ...]
    scale_dtype: torch.dtype
    offset: str

    @property
    def per_channel(self) -> bool:
        """Whether there is one scale, or one per index of a single axis."""
        several = [(c, s) for c, s in zip(self.counts, self.shape, strict=True) if c > 1]
        return not several or (len(several) == 1 and several[0][0] == several[0][1])


@dataclass(frozen=True)
class QuantizedActivation:
    """A value that is rounded.

    Attributes:
        name: Name of the value.
        node: The op that quantizes it.
        storage: Element type.
        per_channel: Whether it has one scale per channel.
    """

    name: str
    node: fx.Node
    storage: str
    per_channel: bool


def find_quantized_weights(gm: fx.GraphModule) -> list[QuantizedTensor]:
    """All dequantized constants of a graph in neutral form, in order; tables of lookups excepted."""
    found = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or not node.args:
            continue
        data = node.args[0]
        if not isinstance(data, fx.Node) or data.op != "get_attr":
            continue
        name = str(data.target)
        for suffix in ("_quantized", "_data"):
            name = name.removesuffix(suffix)
        value = data.meta["val"]
        if node.target is _ours.shift_scale.default:
            if any(user.target is _ours.lut_to_dense.default for user in node.users):
                continue
            scale, offset, storage, shape = node.args[1:5]
            scales = scale.meta["val"]
            kind = "none" if offset is None else "zero_point"
            if isinstance(offset, fx.Node) and offset.meta["val"].is_floating_point():
                kind = "minimum"
            entry = QuantizedTensor(
                name,
                node,
                data,
                str(storage),
                tuple(scales.shape),
                tuple(shape),
                scales.dtype,
                kind,
            )
        elif str(node.target) == "quantized_decomposed.dequantize_per_channel.default":
            axis = int(node.args[3])
            counts = tuple(n if a == axis else 1 for a, n in enumerate(value.shape))
            entry = _plain(name, node, data, counts, node.args[1].meta["val"].dtype)
        elif str(node.target) == "quantized_decomposed.dequantize_per_tensor.default":
            entry = _plain(name, node, data, (1,) * value.ndim, torch.float32)
        else:
            continue
        found.append(entry)
    return found


def zero_points(gm: fx.GraphModule) -> set[str]:
    """Names of the constants that hold zero points, which the ecosystem's ops take as int64."""
    return {
        str(node.args[2].target)
        for node in gm.graph.nodes
        if str(node.target).startswith("quantized_decomposed.dequantize_per_channel")
        and isinstance(node.args[2], fx.Node)
        and node.args[2].op == "get_attr"
    }


def _plain(
    name: str, node: fx.Node, data: fx.Node, counts: tuple[int, ...], scale_dtype: torch.dtype
) -> QuantizedTensor:
    value = data.meta["val"]
    storage = str(value.dtype).removeprefix("torch.")
    return QuantizedTensor(
        name, node, data, storage, counts, tuple(value.shape), scale_dtype, "zero_point"
    )


def find_quantized_activations(gm: fx.GraphModule) -> list[QuantizedActivation]:
    """All rounded values of a graph in neutral form, in order."""
    found = []
    for node in gm.graph.nodes:
        target = str(node.target)
        if target.startswith("quantized_decomposed.quantize_per_"):
            low, high = node.args[-3], node.args[-2]
            bits = (int(high) - int(low)).bit_length()
            storage = f"{'u' if low == 0 else ''}int{bits}"
            channel = "per_channel" in target
            found.append(QuantizedActivation(_name(node), node, storage, channel))
        elif node.target is _ours.round_to_float.default:
            found.append(QuantizedActivation(_name(node), node, str(node.args[2]), False))
    return found


def _name(node: fx.Node) -> str:
    source = node.args[0]
    return source.name if isinstance(source, fx.Node) else node.name
