"""Where the layers and blocks of a config lie in a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from graphopt.analysis.matrix_form import WeightUse
from graphopt.analysis.partition import Block, find_blocks
from graphopt.analysis.weights import WeightTensor
from graphopt.fitting.moments import bias_of
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import Editor
from graphopt.search.mixed_precision.layers import Layer, uses_of, weights_of
from graphopt.search.rdo.config import RDOConfig

__all__ = ["GraphLayer", "find_layer_blocks", "layers_by_name", "layers_by_node"]


@dataclass(frozen=True)
class GraphLayer:
    """A layer in the graph.

    Attributes:
        entry: What the search knows of it: its name, candidates and sizes.
        weight: Its tensor and nodes.
        use: The one op that reads it in a known form; None where it has none, or several.
        bias: The constant that takes up the mean of its error, or None.
        bias_value: Its value in the exact program.
    """

    entry: Layer
    weight: WeightTensor
    use: WeightUse | None
    bias: fx.Node | None
    bias_value: Tensor | None

    @classmethod
    def of(
        cls,
        entry: Layer,
        weight: WeightTensor,
        use: WeightUse | None,
        edit: Editor,
        config: RDOConfig,
    ) -> GraphLayer:
        """A layer under the options of a config."""
        bias = bias_of(use) if use is not None and config.feedback.compensate else None
        value = None if bias is None else edit.value(bias).detach()
        return cls(entry, weight, use, bias, value)

    @property
    def name(self) -> str:
        """Name of its weight."""
        return self.entry.name


def layers_by_name(
    gm: CapturedModule, layers: Sequence[Layer], config: RDOConfig
) -> dict[str, GraphLayer]:
    """The layers of a graph by name."""
    weights = {weight.name: weight for weight in weights_of(gm)}
    uses = uses_of(gm, [layer.name for layer in layers])
    edit = Editor(gm)
    return {
        layer.name: GraphLayer.of(layer, weights[layer.name], uses.get(layer.name), edit, config)
        for layer in layers
    }


def layers_by_node(
    gm: CapturedModule, layers: Sequence[Layer], config: RDOConfig
) -> dict[fx.Node, GraphLayer]:
    """The layers of a graph by the nodes that read them."""
    named = {node.name: node for node in gm.graph.nodes}
    by_node: dict[fx.Node, GraphLayer] = {}
    for layer in layers_by_name(gm, layers, config).values():
        by_node |= {named[name]: layer for name in layer.entry.nodes}
    return by_node


def find_layer_blocks(
    gm: CapturedModule,
    layers: Mapping[fx.Node, GraphLayer],
    partners: Mapping[fx.Node, fx.Node],
    config: RDOConfig,
) -> list[Block]:
    """Blocks whose outputs are known in the exact program."""
    options = config.blocks
    blocks = find_blocks(
        gm.graph, layers.__contains__, width=options.width, min_targets=options.min_layers
    )
    result: list[Block] = []
    pending: list[Block] = []
    for block in blocks:
        pending.append(block)
        if block is blocks[-1] or all(node in partners for node in block.outputs):
            nodes = tuple(node for part in pending for node in part.nodes)
            targets = tuple(node for part in pending for node in part.targets)
            result.append(Block(nodes, pending[0].inputs, block.outputs, targets))
            pending = []
    return result
