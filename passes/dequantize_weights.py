"""Turn quantized weights back into the floats that they stand for, to compress them anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from typing_extensions import override

from graphopt.analysis.stored_values import find_quantized_weights, stored_values
from graphopt.ir.editor import Editor, operands
from graphopt.passes.expand_tables import drop_unread
from graphopt.passes.pass_base import Pass
from graphopt.run.interpreter import constant_value

__all__ = ["DecodeWeights", "DequantizeWeights"]


@dataclass(frozen=True)
class DequantizeWeights(Pass):
    """Replace every dequantized constant by its float values; activations stay quantized.

    Before:
        %w = quantized_decomposed.dequantize_per_channel(%w_int8, %scales, %zero_points, 0, …)
        %y = linear(%x, %w)

    After:
        %w = get_attr[fc.weight]
        %y = linear(%x, %w)

    A model that torchao's `convert_pt2e` made has integer weights that are left alone as compressed
    already; behind this pass they can be palettized or quantized again, the activations' rounding
    untouched.

    Examples:
        >>> program = graphopt.compress(model, example, {"quantization": {"global_config": None}})
        >>> DequantizeWeights()(program.graph_module).modified  # nothing was quantized
        False
    """

    name: ClassVar[str] = "dequantize-weights"

    @override
    def run(self, edit: Editor) -> None:
        for weight in find_quantized_weights(edit.gm):
            _replace(edit, weight.node, weight.name)
        # convert_pt2e without folding leaves the weight in front of its quantize op
        for node in list(edit.gm.graph.nodes):
            source = _rounded_constant(node)
            if source is not None:
                _replace(edit, node, str(source.target))


@dataclass(frozen=True)
class DecodeWeights(Pass):
    """Replace every stored weight, whatever its form, by its float values; activations stay as they are.

    Before:
        %w = graphopt.lut_to_dense(%indices, %lut, n_bits, shape)
        %y = linear(%x, %w)

    After:
        %w = get_attr[fc.weight]
        %y = linear(%x, %w)

    The graph computes the same and decodes nothing when it is called: for evaluations.

    Examples:
        >>> gm = compressed.graph_module
        >>> DecodeWeights()(gm).modified
        True
        >>> {tensor.dtype for tensor in gm.state_dict().values()}
        {torch.float32}
    """

    name: ClassVar[str] = "decode-weights"

    @override
    def run(self, edit: Editor) -> None:
        # what is stored in two steps (pruned values in a table) takes two rounds
        while weights := [weight for weight in stored_values(edit.gm) if not weight.nested]:
            for weight in weights:
                _replace(edit, weight.dense, weight.name)


def _rounded_constant(node: fx.Node) -> fx.Node | None:
    if not str(node.target).startswith("quantized_decomposed.dequantize_per_"):
        return None
    stored = node.args[0]
    if not isinstance(stored, fx.Node) or not str(stored.target).startswith(
        "quantized_decomposed.quantize_per_"
    ):
        return None
    source = stored.args[0]
    return source if isinstance(source, fx.Node) and source.op == "get_attr" else None


def _replace(edit: Editor, node: fx.Node, name: str) -> None:
    made = edit.constant(name, constant_value(edit.gm, node), like=node)
    read = operands(node)
    edit.replace(node, made)
    drop_unread(edit, read)
