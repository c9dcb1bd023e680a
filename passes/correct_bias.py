"""Let biases take up the mean error of compressed layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.errors import CalibrationError
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.correspondence import Correspondence
from graphopt.ir.editor import Editor, operands
from graphopt.passes.pass_base import Pass
from graphopt.run.batches import as_batch
from graphopt.run.layerwise import LayerwiseRun

__all__ = ["CorrectBias", "channel_axis"]

_aten = torch.ops.aten
_CHANNELS_LAST = (_aten.linear.default,)
_CHANNELS_SECOND = (
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
    *(_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding),
    *(_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input),
)
_NORM = _aten._native_batch_norm_legit_no_training.default


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Add to each bias the mean by which its layer's outputs have moved, layer by layer.

    `b ← b + E[z − ẑ]` per output channel (Nagel et al., "Data-free quantization", arXiv 1906.04721,
    section 4.2, measured instead of derived). A layer without a bias gets one; layers in front of a
    batch norm are left to `ReestimateBatchNorm`, and biases that several layers share stay.

    Attributes:
        data: Inputs of one call each, as for `as_batch`.
        reference: The uncompressed graph.
        dense: Names of stored tensors that count as compressed, though no lookup produces them.
    """

    name: ClassVar[str] = "correct-bias"
    tolerance: ClassVar[float | None] = None
    data: Sequence[Any]
    reference: CapturedModule
    dense: frozenset[str] = frozenset()

    @override
    def run(self, edit: Editor) -> None:
        gm = edit.gm
        assert isinstance(gm, CapturedModule)
        partners = Correspondence.by_name(gm, self.reference)
        layers = [
            node
            for node in edit.calls(*_CHANNELS_LAST, *_CHANNELS_SECOND)
            if _is_correctable(edit, node, self.dense) and node in partners
        ]
        if not layers:
            return
        if not self.data:
            raise CalibrationError("no data: biases cannot be corrected")
        batches = [as_batch(each) for each in self.data]
        exact = LayerwiseRun(self.reference, batches)
        wanted: dict[fx.Node, Tensor] = {}
        measured = {partners[node] for node in layers}
        for node in self.reference.graph.nodes:
            if node.op != "output":
                exact.step(node)
            if node in measured:
                wanted[node] = _means(exact.values(node), node)
        for node in layers:
            if len(node.args) < 3 or node.args[2] is None:
                _add_bias(edit, node, len(wanted[partners[node]]))
        run = LayerwiseRun(gm, batches)
        for node in list(gm.graph.nodes):
            if node.op == "output":
                break
            if node not in layers:
                run.step(node)
                continue
            run.step(node, keep_inputs=True)
            change = wanted[partners[node]] - _means(run.values(node), node)
            bias = node.args[2]
            assert isinstance(bias, fx.Node)
            old = edit.value(bias).detach()
            edit.set_value(bias, (old.double() + change).to(old.dtype))
            run.step(node)


def channel_axis(node: fx.Node) -> int | None:
    """Channel axis of the output of an op whose bias can be corrected, None for others."""
    if node.target in _CHANNELS_LAST:
        return -1
    return 1 if node.target in _CHANNELS_SECOND else None


def _is_correctable(edit: Editor, node: fx.Node, dense: frozenset[str]) -> bool:
    if any(user.target is _NORM for user in node.users):
        return False
    weight = node.args[1]
    bias = node.args[2] if len(node.args) > 2 else None
    if not isinstance(weight, fx.Node):
        return False
    if weight.op == "get_attr" and str(weight.target) not in dense:
        return False  # not compressed
    if bias is None:
        return True
    if not isinstance(bias, fx.Node) or bias.op != "get_attr" or set(bias.users) != {node}:
        return False
    path = str(bias.target)
    return all(str(other.target) != path or other is bias for other in edit.constants())


def _add_bias(edit: Editor, node: fx.Node, channels: int) -> None:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    stored = next((each for each in _sources(weight) if each.op == "get_attr"), weight)
    owner = str(stored.target).rpartition(".")[0]
    value = node.meta["val"]
    zeros = torch.zeros(channels, dtype=value.dtype)
    made = edit.constant(f"{owner}.bias" if owner else "bias", zeros, like=node)
    edit.set_args(node, (*node.args[:2], made, *node.args[3:]))


def _sources(node: fx.Node) -> list[fx.Node]:
    found = [node]
    for each in found:
        found += [used for used in operands(each) if used not in found]
    return found


def _means(values: Sequence[Tensor], node: fx.Node) -> Tensor:
    """Mean of each channel over all batches, float64."""
    axis = channel_axis(node)
    assert axis is not None
    total = sum(value.double().movedim(axis, 0).flatten(1).sum(1) for value in values)
    count = sum(value.numel() // value.shape[axis] for value in values)
    return torch.as_tensor(total) / count
