"""Let biases take up the mean error of compressed layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from typing_extensions import override

from graphopt.analysis.weights import source_of
from graphopt.errors import CalibrationError
from graphopt.fitting.channel_moments import ChannelMoments, moved_bias
from graphopt.ir import op_info
from graphopt.ir.captured_module import CapturedModule, callable_graph
from graphopt.ir.correspondence import Correspondence
from graphopt.ir.editor import Editor, operands
from graphopt.ir.op_info import OpInfo, WeightSlot
from graphopt.ir.state import carried_state
from graphopt.passes.pass_base import Pass
from graphopt.run.batches import Batch, run_call
from graphopt.run.calibration_data import read_calls
from graphopt.run.layerwise import LayerwiseRun

__all__ = ["CorrectBias", "channel_axis"]

_CHECKED = 4  # batches whose outputs are compared


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Add to each bias the mean by which its layer's outputs have moved, layer by layer.

    `b ← b + E[z − ẑ]` per output channel (Nagel et al., "Data-free quantization", arXiv 1906.04721,
    section 4.2, measured instead of derived). A layer without a bias gets one; layers in front of a
    batch norm are left to `ReestimateBatchNorm`, and biases that several layers share stay.

    A layer's bias is corrected only where what the other batches say brings the outputs of each batch
    closer on the mean (the samples of a single batch stand for batches); and all stay as they were
    where together they would take the outputs of the graph farther from the reference's.

    Attributes:
        data: Inputs of one call each, as for `as_batch`.
        reference: The uncompressed graph.
        dense: Names of stored tensors that count as compressed, though no lookup produces them.

    Examples:
        >>> gm = compressed.graph_module
        >>> CorrectBias(batches, reference=program.module())(gm).modified
        True
    """

    name: ClassVar[str] = "correct-bias"
    tolerance: ClassVar[float | None] = None
    data: Sequence[Any]
    reference: CapturedModule
    dense: frozenset[str] = frozenset()

    @override
    def run(self, edit: Editor) -> None:
        gm = callable_graph(edit.gm)
        partners = Correspondence.by_name(gm, self.reference)
        layers = [
            node
            for node in edit.calls(*op_info.targets(lambda info: _slot_with_bias(info) is not None))
            if _is_correctable(edit, node, self.dense) and node in partners
        ]
        if not layers:
            return
        if not self.data:
            raise CalibrationError("no data: biases cannot be corrected")
        batches = list(read_calls(gm, self.data))
        exact = LayerwiseRun(self.reference, batches)
        wanted: dict[fx.Node, _Means] = {}
        measured = {partners[node] for node in layers}
        for node in self.reference.graph.nodes:
            if node.op != "output":
                exact.step(node)
            if node in measured:
                wanted[node] = _means(exact, node)
        checked = batches[:: math.ceil(len(batches) / _CHECKED)]
        before = _distance(gm, self.reference, checked)
        kept = {node: _bias_of(node) for node in layers}
        for node in layers:
            if kept[node] is None:
                _add_bias(edit, node, wanted[partners[node]].each.shape[1])
        values = {node: edit.value(_constant(node)) for node in layers}
        changed = self._correct(edit, gm, batches, {n: wanted[partners[n]] for n in layers})
        gm.recompile()
        if changed and _distance(gm, self.reference, checked) > before:
            changed = []
            for node in layers:
                edit.set_value(_constant(node), values[node])
        for node in layers:
            if kept[node] is None and node not in changed:
                _set_bias(edit, node, None)

    def _correct(
        self, edit: Editor, gm: CapturedModule, batches: list[Batch], wanted: dict[fx.Node, _Means]
    ) -> list[fx.Node]:
        """Correct layer by layer; the layers whose biases have changed."""
        changed = []
        run = LayerwiseRun(gm, batches)
        for node in list(gm.graph.nodes):
            if node.op == "output":
                break
            if node not in wanted:
                run.step(node)
                continue
            run.step(node, keep_inputs=True)
            missing = wanted[node].less(_means(run, node))
            if missing.helps_others():
                bias = _constant(node)
                edit.set_value(bias, moved_bias(edit.value(bias), missing.total()))
                changed.append(node)
            run.step(node)
        return changed


@dataclass(frozen=True)
class _Means:
    """Means of channels batch by batch.

    Attributes:
        each: [batches, channels] float64.
        counts: Values of each, [batches, 1] float64.
    """

    each: Tensor
    counts: Tensor

    def less(self, other: _Means) -> _Means:
        if self.each.shape != other.each.shape:  # a batch has come to one of the two alone
            return _Means(self.each[:0], self.counts[:0])
        return _Means(self.each - other.each, self.counts)

    def total(self) -> Tensor:
        """The mean of all, [channels]."""
        return (self.each * self.counts).sum(0) / self.counts.sum()

    def helps_others(self) -> bool:
        """Whether adding the mean of the others brings each batch closer to 0, on the whole."""
        if len(self.each) < 2:
            return len(self.each) == 1
        rest = self.counts.sum() - self.counts
        others = ((self.each * self.counts).sum(0) - self.each * self.counts) / rest
        gains = others * (2 * self.each - others)
        return float((gains * self.counts).sum()) > 0


def channel_axis(node: fx.Node) -> int | None:
    """Channel axis of the output of an op whose bias can be corrected, None for others."""
    info = op_info.info_of(node)
    slot = None if info is None else _slot_with_bias(info)
    return None if slot is None else slot.result_axis


def _slot_with_bias(info: OpInfo) -> WeightSlot | None:
    """The weight whose output channels a bias of the op counts."""
    return next((slot for slot in info.weights if slot.bias is not None), None)


def _slot_of(node: fx.Node) -> WeightSlot:
    info = op_info.info_of(node)
    slot = None if info is None else _slot_with_bias(info)
    assert slot is not None
    return slot


def _bias_of(node: fx.Node) -> object:
    return op_info.argument(node, _slot_of(node).bias)


def _is_correctable(edit: Editor, node: fx.Node, dense: frozenset[str]) -> bool:
    if any(op_info.is_batch_norm(user) for user in node.users):
        return False
    slot = _slot_of(node)
    weight, bias = node.args[slot.position], _bias_of(node)
    if not isinstance(weight, fx.Node) or not _is_compressed(weight, slot, dense):
        return False
    if bias is None:
        return True
    if not isinstance(bias, fx.Node) or bias.op != "get_attr" or set(bias.users) != {node}:
        return False
    if edit.value(bias).ndim != 1:
        return False  # it is added per position, too
    path = str(bias.target)
    return all(str(other.target) != path or other is bias for other in edit.constants())


def _is_compressed(weight: fx.Node, slot: WeightSlot, dense: frozenset[str]) -> bool:
    source = source_of(weight, slot.channel_axis)
    if source is None:
        return weight.op != "get_attr"
    known = source.compressed or source.sparse is not None
    return known or str(source.node.target) in dense


def _add_bias(edit: Editor, node: fx.Node, channels: int) -> None:
    slot = _slot_of(node)
    weight = node.args[slot.position]
    assert isinstance(weight, fx.Node)
    assert slot.bias is not None
    stored = next((source for source in _sources(weight) if source.op == "get_attr"), weight)
    owner = str(stored.target).rpartition(".")[0]
    value = node.meta["val"]
    zeros = torch.zeros(channels, dtype=value.dtype)
    made = edit.constant(f"{owner}.bias" if owner else "bias", zeros, like=node)
    _set_bias(edit, node, made)


def _set_bias(edit: Editor, node: fx.Node, bias: fx.Node | None) -> None:
    slot = _slot_of(node)
    assert slot.bias is not None
    edit.set_args(node, (*node.args[: slot.bias], bias, *node.args[slot.bias + 1 :]))


def _sources(node: fx.Node) -> list[fx.Node]:
    sources = [node]
    for reader in sources:
        sources += [used for used in operands(reader) if used not in sources]
    return sources


def _means(run: LayerwiseRun, node: fx.Node) -> _Means:
    """Means of the channels of an output, batch by batch, or sample by sample of a single one."""
    axis = channel_axis(node)
    assert axis is not None
    values = [value for value in run.values(node) if value.numel()]
    if not values:
        return _Means(torch.zeros(0, node.meta["val"].shape[axis]), torch.zeros(0, 1))
    channels = values[0].ndim + axis if axis < 0 else axis
    if len(values) == 1 and channels > 0 and values[0].ndim > 1:
        values = list(values[0].split(1))
    each = torch.stack([ChannelMoments.of([value], axis).mean for value in values])
    counts = torch.tensor([float(value.numel() // value.shape[axis]) for value in values])
    return _Means(each, counts.double()[:, None])


@torch.no_grad()
def _distance(gm: CapturedModule, reference: CapturedModule, batches: list[Batch]) -> float:
    """Squared error of a graph's outputs, relative to the reference's."""
    total = 0.0
    for batch in batches:
        outputs = []
        for module in (gm, reference):
            with carried_state(module):
                outputs.append(_floats(run_call(module, batch)))
        for made, wanted in zip(*outputs, strict=True):
            size = float(wanted.double().square().sum())
            total += float((made.double() - wanted.double()).square().sum()) / max(size, 1e-30)
    return total


def _floats(outputs: object) -> list[Tensor]:
    leaves = pytree.tree_leaves(outputs)
    return [each for each in leaves if isinstance(each, Tensor) and each.is_floating_point()]


def _constant(node: fx.Node) -> fx.Node:
    bias = _bias_of(node)
    assert isinstance(bias, fx.Node)
    return bias
