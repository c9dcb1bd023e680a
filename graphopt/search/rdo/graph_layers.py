"""Where the layers and blocks of a config lie in a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from graphopt.analysis.partition import Block, find_blocks
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import Editor
from graphopt.search.mixed_precision.layers import Layer, uses_of, weights_of
from graphopt.search.rdo.config import RDOConfig
from graphopt.search.rdo.fits import LayerSite

__all__ = ["find_layer_blocks", "layers_by_name", "layers_by_node"]


def layers_by_name(
    gm: CapturedModule, layers: Sequence[Layer], config: RDOConfig
) -> dict[str, LayerSite]:
    """The layers of a graph by name."""
    weights = {weight.name: weight for weight in weights_of(gm)}
    uses = uses_of(gm, [layer.name for layer in layers])
    edit = Editor(gm)
    return {
        layer.name: LayerSite.of(layer, weights[layer.name], uses.get(layer.name), edit, config)
        for layer in layers
    }


def layers_by_node(
    gm: CapturedModule, layers: Sequence[Layer], config: RDOConfig
) -> dict[fx.Node, LayerSite]:
    """The layers of a graph by the nodes that read them."""
    named = {node.name: node for node in gm.graph.nodes}
    by_node: dict[fx.Node, LayerSite] = {}
    for site in layers_by_name(gm, layers, config).values():
        by_node |= {named[name]: site for name in site.layer.nodes}
    return by_node


def find_layer_blocks(
    gm: CapturedModule,
    sites: Mapping[fx.Node, LayerSite],
    partners: Mapping[fx.Node, fx.Node],
    config: RDOConfig,
) -> list[Block]:
    """Blocks whose outputs are known in the exact program."""
    options = config.blocks
    blocks = find_blocks(
        gm.graph, sites.__contains__, width=options.width, min_targets=options.min_layers
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
