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
from graphopt.prepared import ActivationQuantizer
from graphopt.run.batches import Batch
from graphopt.run.block_forward import BlockForward
from graphopt.run.layerwise import LayerwiseRun
from graphopt.search.rdo.config import RDOConfig
from graphopt.search.rdo.curvature import Curvature
from graphopt.search.rdo.fits import Fitted, LayerSite, take_target

__all__ = ["BlockSite", "Walk", "partners_of"]


def partners_of(work: CapturedModule, exact: CapturedModule) -> Correspondence:
    """Nodes of a graph → nodes of the exact one; a rounding stands for what it rounds."""

    def rounded(node: fx.Node) -> fx.Node | None:
        source = node.args[0]
        rounds = isinstance(work.get_submodule(str(node.target)), ActivationQuantizer)
        return source if rounds and isinstance(source, fx.Node) else None

    return Correspondence.by_name(work, exact, stands_for=rounded)


@dataclass
class BlockSite:
    """A block that the walk has come to.

    Attributes:
        number: Its place among the blocks.
        block: Its nodes in the graph that is being compressed.
        forward: Runs it with the inputs that the compressed blocks before give.
        layers: Its layers in the order of the graph.
        names: For each output, the name of its partner in the exact program; "" where it is no float.
        changed: Whether a weight has changed behind which the block had run already.
    """

    number: int
    block: Block
    forward: BlockForward
    layers: list[LayerSite]
    names: list[str]
    changed: bool = False


class Walk:
    """The state of one pass over the blocks.

    Args:
        exact: The exact graph.
        work: The graph whose weights are replaced; its activations may be rounded.
        blocks: Blocks of `work`.
        sites: The layers of `work` by node.
        batches: Calibration inputs.
        curvature: Gradients at the blocks' outputs.
        config: Options.
    """

    def __init__(
        self,
        exact: CapturedModule,
        work: CapturedModule,
        blocks: Sequence[Block],
        sites: Mapping[fx.Node, LayerSite],
        batches: Sequence[Batch],
        curvature: Curvature,
        config: RDOConfig,
    ) -> None:
        self.edit = Editor(work)
        self.run = LayerwiseRun(work, batches)
        self.reference = LayerwiseRun(exact, batches)
        self.partners = partners_of(work, exact)
        self.blocks_found, self.sites = blocks, sites
        self.curvature, self.config = curvature, config
        self.count = len(batches)
        held = round(config.held_out * len(batches))
        self.held = list(range(len(batches)))[len(batches) - held :] if held else []
        self.fitting = list(range(len(batches) - len(self.held)))
        self._done: set[fx.Node] = set()
        self._order = iter(exact.graph.nodes)
        self._set_up: set[str] = set()

    def blocks(self) -> Iterator[BlockSite]:
        """Every block in order; a block is run when the next one is asked for."""
        for number, block in enumerate(self.blocks_found):
            names = [self.partners[node].name if is_float(node) else "" for node in block.outputs]
            layers = [self.sites[node] for node in block.nodes if node in self.sites]
            unique = {site.layer.name: site for site in reversed(layers)}
            fresh = [
                site for site in reversed(unique.values()) if site.layer.name not in self._set_up
            ]
            self._set_up |= set(unique)
            site = BlockSite(number, block, BlockForward(self.run, block), fresh, names)
            yield site
            for node in block.nodes:
                self._step(node)
            if site.changed:
                made = self.outputs(site, range(self.count))
                for place, node in enumerate(block.outputs):
                    self.run.set_values(node, [outputs[place] for outputs in made])

    def inputs_of(self, site: LayerSite, block: Block) -> LayerTarget | None:
        """Run up to a layer and take what its fits need; None for a lookup, or an unknown op."""
        use = site.use
        node = self._first(site, block) if use is None else use.node
        for earlier in block.nodes:
            if earlier is node:
                break
            self._step(earlier)
        if use is None or use.form.kind == "lookup":
            return None
        source = node.args[use.form.data]
        assert isinstance(source, fx.Node)
        exact = self.reference.values(self._come_to(source))
        missing = missing_beside(use, self.run, self.reference, self.partners)
        saliency = self.curvature.saliency.get(self.partners[node].name)
        return take_target(site, self.run.values(source), exact, saliency, missing, self.config)

    def importance(self, site: LayerSite) -> Tensor | None:
        """What a squared error of each output row of a layer costs, where known."""
        if site.use is None:
            return None
        total = self.curvature.rows.get(self.partners[site.use.node].name)
        return None if total is None else total / self.count

    def _first(self, site: LayerSite, block: Block) -> fx.Node:
        return next(node for node in block.nodes if self.sites.get(node) is site)

    def _step(self, node: fx.Node) -> None:
        if node not in self._done:
            self._done.add(node)
            if node in self.partners:
                self._come_to(node)
            self.run.step(node)

    def _come_to(self, node: fx.Node) -> fx.Node:
        """Run the exact program up to the partner of a node."""
        partner = self.partners[node]
        while not self.reference.has_run(partner):
            following = next(self._order)
            if following.op != "output":
                self.reference.step(following)
        return partner

    def apply(self, site: LayerSite, fitted: Fitted) -> None:
        """Let the graph compute with a layer's compressed form."""
        dense = site.weight.tensor.detach() if fitted.stored is None else fitted.stored.dense()
        self.set_weight(site, dense, fitted.bias)

    def set_weight(self, site: LayerSite, dense: Tensor, bias: Tensor | None) -> None:
        """Let the graph compute with another weight; a bias of None is the exact one."""
        nodes = site.weight.nodes
        self.edit.set_value(nodes[0], dense.to(site.weight.tensor.dtype), tied=nodes[1:])
        if site.bias is not None and site.bias_value is not None:
            self.edit.set_value(site.bias, site.bias_value if bias is None else bias)

    @torch.no_grad()
    def outputs(self, site: BlockSite, numbers: Sequence[int]) -> list[list[Tensor]]:
        """Outputs of a block for some batches, one list per batch, with the weights as they are."""
        constants = site.forward.constants({})
        return [site.forward(constants, number) for number in numbers]

    def goals(self, site: BlockSite) -> list[list[Tensor]]:
        """Outputs that the block should have, one list per batch; runs the exact program there."""
        partners = [self._come_to(node) for node in site.block.outputs]
        values = [self.reference.values(partner) for partner in partners]
        return [list(outputs) for outputs in zip(*values, strict=True)]

    def loss(
        self,
        site: BlockSite,
        outputs: Sequence[Sequence[Tensor]],
        wanted: Sequence[Sequence[Tensor]],
        numbers: Sequence[int],
    ) -> float:
        """What it costs at the model's outputs that a block's are `outputs` instead of `wanted`."""
        changes: dict[str, list[Tensor]] = {}
        for place, name in enumerate(site.names):
            if name:
                pairs = zip(outputs, wanted, strict=True)
                changes[name] = [own[place] - other[place] for own, other in pairs]
        return self.curvature.loss(changes, numbers)
