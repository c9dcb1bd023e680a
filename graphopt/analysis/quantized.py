"""The ecosystem's quantize ops, and the activations that a program rounds, for refusals and counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.audited import module_of

__all__ = [
    "QuantizedActivation",
    "find_quantized_activations",
    "quantized_ops",
    "zero_points",
]

_ours = torch.ops.graphopt


def quantized_ops() -> Any:
    """The `quantized_decomposed` ops of the ecosystem, which this makes torch register."""
    # a module of torch that is bound to move registers them
    module_of("torch.ao.quantization.fx._decomposed")
    return torch.ops.quantized_decomposed


@dataclass(frozen=True)
class QuantizedActivation:
    """A value that is rounded.

    Attributes:
        name: Name of the value.
        node: The op that quantizes it.
        storage: Element type.
        per_channel: Whether it has one scale per channel.
        dynamic: Whether its scales are computed when the program runs.
    """

    name: str
    node: fx.Node
    storage: str
    per_channel: bool
    dynamic: bool = False


def zero_points(gm: fx.GraphModule) -> set[str]:
    """Names of the constants that hold zero points, which the ecosystem's ops take as int64."""
    return {
        str(node.args[2].target)
        for node in gm.graph.nodes
        if str(node.target).startswith("quantized_decomposed.dequantize_per_channel")
        and isinstance(node.args[2], fx.Node)
        and node.args[2].op == "get_attr"
    }


def find_quantized_activations(gm: fx.GraphModule) -> list[QuantizedActivation]:
    """All rounded values of a graph in neutral form, in order."""
    activations = []
    for node in gm.graph.nodes:
        target = str(node.target)
        if target.startswith("quantized_decomposed.quantize_per_"):
            low, high = node.args[-3], node.args[-2]
            bits = (int(high) - int(low)).bit_length()
            storage = f"{'u' if low == 0 else ''}int{bits}"
            channel = "per_channel" in target
            activations.append(QuantizedActivation(_name(node), node, storage, channel))
        elif node.target is _ours.round_to_float.default:
            activations.append(QuantizedActivation(_name(node), node, str(node.args[2]), False))
        elif node.target is _ours.round_by_range.default:
            storage = str(node.args[2])
            activations.append(QuantizedActivation(_name(node), node, storage, False, True))
    return activations


def _name(node: fx.Node) -> str:
    source = node.args[0]
    return source.name if isinstance(source, fx.Node) else node.name
