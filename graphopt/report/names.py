"""Names of weights as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from graphopt.analysis.weights import source_of

__all__ = ["common_prefix", "weight_name", "weight_of"]

_SUFFIXES = ("_indices", "_lut", "_quantized", "_values", "_data")


def weight_name(path: str) -> str:
    """The weight that a stored tensor belongs to: its own name without that of the part."""
    for _ in range(2):
        for suffix in _SUFFIXES:
            path = path.removesuffix(suffix)
    return path


def weight_of(operand: fx.Node) -> str:
    """Name of the weight that an operand is, stored as it is or in parts."""
    source = source_of(operand, 0)
    return weight_name(str(source.node.target) if source is not None else operand.name)


def common_prefix(names: Sequence[str]) -> str:
    """What all dotted names begin with, in whole parts, the dot included.

    >>> common_prefix(["model.encoder.0.weight", "model.encoder.1.weight"])
    'model.encoder.'
    """
    split = [name.split(".")[:-1] for name in names]
    if not split:
        return ""
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)
