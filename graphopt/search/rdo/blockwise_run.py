"""Go through the blocks of two programs side by side: the exact one and the one being compressed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.analysis.partition import Block
from graphopt.analysis.value_facts import is_float
from graphopt.fitting.layer_target import LayerTarget
from graphopt.fitting.moments import missing_beside
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.correspondence import Correspondence
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.prepared import ActivationQuantizer
from graphopt.run.activation_store import ActivationStore
from graphopt.run.batches import Batch
from graphopt.run.block_forward import BlockForward
from graphopt.run.layerwise import LayerwiseRun
from graphopt.search.mixed_precision.layers import Layer
from graphopt.search.rdo.config import RDOConfig
from graphopt.search.rdo.curvature import Curvature
from graphopt.search.rdo.graph_layers import GraphLayer, find_layer_blocks, layers_by_node
from graphopt.search.rdo.layer_fit import LayerFit, take_target

__all__ = ["BlockwiseRun", "GraphBlock", "partners_of", "run_from_exact"]


def partners_of(work: CapturedModule, exact: CapturedModule) -> Correspondence:
    """Nodes of a graph → nodes of the exact one; a rounding stands for what it rounds."""

    def rounded(node: fx.Node) -> fx.Node | None:
        source = node.args[0]
        rounds = isinstance(work.get_submodule(str(node.target)), ActivationQuantizer)
        return source if rounds and isinstance(source, fx.Node) else None

    return Correspondence.by_name(work, exact, stands_for=rounded)


@dataclass
class GraphBlock:
    """A block that a block-wise run has come to.

    Attributes:
        number: Its place among the blocks.
        subgraph: Its nodes in the graph that is being compressed.
        forward: Runs it with the inputs that the compressed blocks before give.
        layers: Its layers in the order of the graph.
        names: For each output, the name of its partner in the exact program; "" where it is no float.
        changed: Whether a weight has changed behind which the block had run already.
    """

    number: int
    subgraph: Block
    forward: BlockForward
    layers: list[GraphLayer]
    names: list[str]
    changed: bool = False


def run_from_exact(
    programs: tuple[Program, Program],
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    curvature: Curvature,
    config: RDOConfig,
    store: ActivationStore,
) -> BlockwiseRun:
    """A pass over the blocks that begins with exact weights.

    Args:
        programs: The exact one, and the one to compress, which is copied.
        layers: Its layers.
        batches: Calibration inputs.
        curvature: Gradients at the blocks' outputs.
        config: Options.
        store: What holds the values of both.
    """
    exact, work = programs[0].graph_module, programs[1].copy().graph_module
    by_node = layers_by_node(work, layers, config)
    blocks = find_layer_blocks(work, by_node, partners_of(work, exact), config)
    compressed, reference = (LayerwiseRun(graph, batches, store) for graph in (work, exact))
    return BlockwiseRun(compressed, reference, blocks, by_node, curvature, config)


class BlockwiseRun:
    """One pass over the blocks of a graph, beside the exact graph.

    Args:
        compressed: A run of the graph whose weights are replaced; its activations may be rounded.
        reference: A run of the exact graph on the same batches.
        blocks: Blocks of the former.
        layers: Its layers by node.
        curvature: Gradients at the blocks' outputs.
        config: Options.

    Attributes:
        compressed: Values of the former up to where the pass has come.
        reference: Values of the exact graph.
        partners: Nodes of the former → nodes of the exact graph.
        count: Number of batches.
        fitting: Numbers of the batches that layers are fitted to.
        held_out: Numbers of those that decide whether a step has helped.
    """

    def __init__(
        self,
        compressed: LayerwiseRun,
        reference: LayerwiseRun,
        blocks: Sequence[Block],
        layers: Mapping[fx.Node, GraphLayer],
        curvature: Curvature,
        config: RDOConfig,
    ) -> None:
        work, exact = compressed.gm, reference.gm
        self.edit = Editor(work)
        self.compressed, self.reference = compressed, reference
        self.partners = partners_of(work, exact)
        self.subgraphs, self.layers = blocks, layers
        self.curvature, self.config = curvature, config
        self.count = compressed.count
        fitting = self.count - round(config.held_out * self.count)
        self.fitting = list(range(fitting))
        self.held_out = list(range(fitting, self.count))
        self._done: set[fx.Node] = set()
        self._order = iter(exact.graph.nodes)
        self._set_up: set[str] = set()

    def blocks(self) -> Iterator[GraphBlock]:
        """Every block in order; a block is run when the next one is asked for."""
        for number, subgraph in enumerate(self.subgraphs):
            ends, nodes = subgraph.outputs, subgraph.nodes
            names = [self.partners[node].name if is_float(node) else "" for node in ends]
            layers = [self.layers[node] for node in nodes if node in self.layers]
            unique = {layer.name: layer for layer in reversed(layers)}
            fresh = [layer for layer in reversed(unique.values()) if layer.name not in self._set_up]
            self._set_up |= set(unique)
            forward = BlockForward(self.compressed, subgraph)
            block = GraphBlock(number, subgraph, forward, fresh, names)
            yield block
            for node in nodes:
                self._step(node)
            if block.changed:
                batches = self.outputs(block, range(self.count))
                for place, node in enumerate(ends):
                    self.compressed.set_values(node, [outputs[place] for outputs in batches])

    def target_of(self, layer: GraphLayer, block: GraphBlock) -> LayerTarget | None:
        """Run up to a layer and take what its fits need; None for a lookup, or an unknown op."""
        use = layer.use
        node = self._first(layer, block) if use is None else use.node
        for earlier in block.subgraph.nodes:
            if earlier is node:
                break
            self._step(earlier)
        if use is None or use.form.kind == "embedding":
            return None
        source = node.args[use.form.data]
        assert isinstance(source, fx.Node)
        exact = self.reference.values(self._run_exact_to(source))
        missing = missing_beside(use, self.compressed, self.reference, self.partners)
        saliency = self.curvature.saliency.get(self.partners[node].name)
        return take_target(
            layer, self.compressed.values(source), exact, saliency, missing, self.config
        )

    def importance(self, layer: GraphLayer) -> Tensor | None:
        """What a squared error of each output row of a layer costs, where known."""
        if layer.use is None:
            return None
        total = self.curvature.rows.get(self.partners[layer.use.node].name)
        return None if total is None else total / self.count

    def _first(self, layer: GraphLayer, block: GraphBlock) -> fx.Node:
        return next(node for node in block.subgraph.nodes if self.layers.get(node) is layer)

    def _step(self, node: fx.Node) -> None:
        if node not in self._done:
            self._done.add(node)
            if node in self.partners:
                self._run_exact_to(node)
            self.compressed.step(node)

    def _run_exact_to(self, node: fx.Node) -> fx.Node:
        """Run the exact program up to the partner of a node."""
        partner = self.partners[node]
        while not self.reference.has_run(partner):
            following = next(self._order)
            if following.op != "output":
                self.reference.step(following)
        return partner

    def apply(self, layer: GraphLayer, fitted: LayerFit) -> None:
        """Let the graph compute with a layer's compressed form."""
        dense = layer.weight.tensor.detach() if fitted.stored is None else fitted.stored.dense()
        self.set_weight(layer, dense, fitted.bias)

    def set_weight(self, layer: GraphLayer, dense: Tensor, bias: Tensor | None) -> None:
        """Let the graph compute with another weight; a bias of None is the exact one."""
        nodes = layer.weight.nodes
        self.edit.set_value(nodes[0], dense.to(layer.weight.tensor.dtype), tied=nodes[1:])
        if layer.bias is not None and layer.bias_value is not None:
            self.edit.set_value(layer.bias, layer.bias_value if bias is None else bias)

    @torch.no_grad()
    def outputs(self, block: GraphBlock, numbers: Sequence[int]) -> list[list[Tensor]]:
        """Outputs of a block for some batches, one list per batch, with the weights as they are."""
        constants = block.forward.constants({})
        return [block.forward(constants, number) for number in numbers]

    def exact_outputs(self, block: GraphBlock) -> list[list[Tensor]]:
        """Outputs that the block should have, one list per batch; runs the exact program there."""
        partners = [self._run_exact_to(node) for node in block.subgraph.outputs]
        values = [self.reference.values(partner) for partner in partners]
        return [list(outputs) for outputs in zip(*values, strict=True)]

    def loss(
        self,
        block: GraphBlock,
        outputs: Sequence[Sequence[Tensor]],
        wanted: Sequence[Sequence[Tensor]],
        numbers: Sequence[int],
    ) -> float:
        """What it costs at the model's outputs that a block's are `outputs` instead of `wanted`."""
        changes: dict[str, list[Tensor]] = {}
        for place, name in enumerate(block.names):
            if name:
                pairs = zip(outputs, wanted, strict=True)
                changes[name] = [own[place] - other[place] for own, other in pairs]
        return self.curvature.loss(changes, numbers)
