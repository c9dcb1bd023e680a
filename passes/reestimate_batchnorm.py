"""Give batch norms the statistics of the compressed network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from typing_extensions import override

from graphopt.errors import CalibrationError
from graphopt.fitting.channel_moments import ChannelMoments
from graphopt.ir import op_info
from graphopt.ir.captured_module import CapturedModule, callable_graph
from graphopt.ir.correspondence import Correspondence
from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass
from graphopt.run.calibration_data import read_calls
from graphopt.run.layerwise import LayerwiseRun

__all__ = ["ReestimateBatchNorm"]


@dataclass(frozen=True)
class ReestimateBatchNorm(Pass):
    """Set mean and variance of every batch norm anew, in order, from unlabelled data.

    Tables shrink each layer's gain in the same direction, and the errors add up; new statistics
    take that out at no cost (Sun et al., "Hybrid 8-bit training", NeurIPS 2019, section 3.3, use
    the same for quantized networks). Each norm is measured behind the norms before it. With a
    reference, a norm's statistics change by as much as those of its input did:
    `σ̂² = σ²·var(ẑ)/var(z)`, `μ̂ = mean(ẑ) − (mean(z) − μ)·σ̂/σ`, so that data that differ from what the
    network was trained on do no harm.

    Attributes:
        data: Inputs of one call each, as for `as_batch`; some hundred samples suffice.
        reference: The uncompressed graph, or None to take over the data's own statistics.

    Examples:
        >>> gm = convolutional.graph_module
        >>> before = gm.get_buffer("1.running_mean").clone()
        >>> ReestimateBatchNorm([torch.randn(4, 3, 8, 8) + 1])(gm).modified
        True
        >>> torch.equal(gm.get_buffer("1.running_mean"), before)
        False
    """

    name: ClassVar[str] = "reestimate-batch-norm"
    tolerance: ClassVar[float | None] = None
    data: Sequence[Any]
    reference: CapturedModule | None = None

    @override
    def run(self, edit: Editor) -> None:
        norms = list(edit.calls(op_info.BATCH_NORM))
        if not norms:
            return
        if not self.data:
            raise CalibrationError("no data: batch norms cannot be estimated again")
        gm = callable_graph(edit.gm)
        batches = list(read_calls(gm, self.data))
        run = LayerwiseRun(gm, batches)
        exact = None if self.reference is None else LayerwiseRun(self.reference, batches)
        partners: Mapping[fx.Node, fx.Node] = (
            {} if self.reference is None else Correspondence.by_name(gm, self.reference)
        )
        upcoming = iter([] if self.reference is None else list(self.reference.graph.nodes))
        for node in list(gm.graph.nodes):
            if node.op == "output" or node.prev is norms[-1]:
                break
            partner = partners.get(node)
            if op_info.is_batch_norm(node):
                self._renew(edit, node, run, exact, partner)
            run.step(node)
            if exact is not None:
                _catch_up(exact, upcoming, partner)

    def _renew(
        self,
        edit: Editor,
        node: fx.Node,
        run: LayerwiseRun,
        exact: LayerwiseRun | None,
        partner: fx.Node | None,
    ) -> None:
        x, mean_node, variance_node = node.args[0], node.args[3], node.args[4]
        assert isinstance(x, fx.Node)
        assert isinstance(mean_node, fx.Node)
        assert isinstance(variance_node, fx.Node)
        now = ChannelMoments.of(run.values(x), axis=1)
        mean, variance = now.mean, now.variance
        if exact is not None and partner is not None and isinstance(partner.args[0], fx.Node):
            old_mean, old_variance = (
                edit.value(statistic).double() for statistic in (mean_node, variance_node)
            )
            before = ChannelMoments.of(exact.values(partner.args[0]), axis=1)
            spread = before.variance
            ratio = torch.where(spread > 0, variance / spread.clamp_min(1e-300), 1.0)
            mean = mean - (before.mean - old_mean) * ratio.sqrt()
            variance = old_variance * ratio
        for constant, value in ((mean_node, mean), (variance_node, variance)):
            old = edit.value(constant)
            edit.set_value(constant, value.to(old.dtype))


def _catch_up(run: LayerwiseRun, upcoming: Iterator[fx.Node], node: fx.Node | None) -> None:
    """Run the reference up to and with the node that corresponds to the one just run."""
    if node is None or run.has_run(node):
        return
    for other in upcoming:
        if other.op != "output":
            run.step(other)
        if other is node:
            return
