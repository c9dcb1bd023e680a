"""Bits that a program stores per weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from graphopt.analysis.quantized import zero_points
from graphopt.analysis.stored_values import stored_values
from graphopt.backends.lowering import as_program
from graphopt.backends.raising import in_vocabulary
from graphopt.errors import InputError
from graphopt.ir.annotations import record_of
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.program import Program
from graphopt.prepared import ActivationQuantizer, WeightQuantizer
from graphopt.schemes.sizes import tensor_bits

__all__ = ["BitsPerWeightResult", "StoredTensor", "bits_per_weight", "stored_tensors"]


@dataclass(frozen=True)
class BitsPerWeightResult:
    """What a program stores.

    Attributes:
        bpw: Stored bits per element, over all parameters and buffers.
        total_bits: Stored bits: indices, tables, scales, masks and what is not compressed.
        total_weights: Elements of the weights that they stand for.
        per_module_map: Name of a module with tensors of its own → its bits per element.

    Examples:
        >>> from graphopt.inspection import bits_per_weight
        >>> stored = bits_per_weight(program)
        >>> isinstance(stored, BitsPerWeightResult), stored.bpw, stored.per_module_map
        (True, 32.0, {'0': 32.0, '2': 32.0})
    """

    bpw: float
    total_bits: int
    total_weights: int
    per_module_map: dict[str, float] = field(repr=False)


def bits_per_weight(
    program: Program | nn.Module | ExportedProgram, example_inputs: Any = None
) -> BitsPerWeightResult:
    """Count what a program stores, compressed or not, from its tensors.

    Args:
        program: A program; a module that a compressor prepared (palettized) or finalized, or any
            other module with `example_inputs`; or an exported program.
        example_inputs: Inputs of one call, where a plain module has to be captured.

    Returns:
        Totals and one figure per module. Scalars inside ops do not count; what a target adds or pads
        is not included (`artifact.size`).

    Raises:
        InputError: A module with quantizers in training form; count what it finalizes to.

    Examples:
        >>> bits_per_weight(model, example).bpw
        32.0
        >>> bits_per_weight(compressed).bpw < 32
        True
    """
    if isinstance(program, CapturedModule) and any(
        isinstance(part, ActivationQuantizer | WeightQuantizer) for part in program.modules()
    ):
        raise InputError(
            "the module still observes; count finalize() or program() of its quantizer"
        )
    if isinstance(program, CapturedModule):
        program = Program(program, ())
    if not isinstance(program, Program):
        program = as_program(program, example_inputs)
    stored = stored_tensors(program.graph_module)
    owners: dict[str, list[int]] = {}
    for name, tensor in stored.items():
        entry = owners.setdefault(name.rpartition(".")[0], [0, 0])
        entry[0] += tensor.bits
        entry[1] += tensor.elements
    total_bits = sum(tensor.bits for tensor in stored.values())
    total = sum(tensor.elements for tensor in stored.values())
    per_module = {name: bits / max(count, 1) for name, (bits, count) in owners.items()}
    return BitsPerWeightResult(total_bits / max(total, 1), total_bits, total, per_module)


@dataclass(frozen=True)
class StoredTensor:
    """A parameter or buffer of a program.

    Attributes:
        elements: Elements of the weight that it stands for: its own, or those of the compressed
            weight whose first part it is, 0 for the other parts.
        bits: Bits that are stored.
        compressed: Whether it is part of a compressed weight.
    """

    elements: int
    bits: int
    compressed: bool


def stored_tensors(gm: CapturedModule) -> dict[str, StoredTensor]:
    """What a program stores, by name; ops of a target are read as ours.

    Zero points count as bytes, and not at all where they are 0, as no target stores them.
    """
    gm = in_vocabulary(gm)
    tensors = dict((*gm.named_parameters(), *gm.named_buffers()))
    elements = _stand_for(gm)
    bits = {name: tensor_bits(t) for name, t in tensors.items()}
    for name in zero_points(gm):
        points = tensors[name]
        bits[name] = 8 * points.numel() if bool(points.any()) else 0
    for row in record_of(gm).compressed:
        # a prepared module computes with dense palettes
        if row.name in bits and tensors[row.name].numel() == row.numel:
            bits[row.name] = row.stored_bits
    return {
        name: StoredTensor(elements.get(name, tensor.numel()), bits[name], name in elements)
        for name, tensor in tensors.items()
    }


def _stand_for(gm: torch.fx.GraphModule) -> dict[str, int]:
    """Tensor of a compressed weight → elements that it stands for; its other parts for none."""
    found: dict[str, int] = {}

    def parts(node: Any) -> list[str]:
        if node.op == "get_attr":
            return [str(node.target)]
        return [name for each in node.all_input_nodes for name in parts(each)]

    for value in stored_values(gm):
        names = parts(value.dense)
        found |= dict.fromkeys(names, 0)
        # values inside a pruned weight are counted with it, later in this list
        found[names[0]] = math.prod(value.shape)
    return found
