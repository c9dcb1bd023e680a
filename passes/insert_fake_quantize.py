"""Put the modules that observe and round into an annotated graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn
from typing_extensions import override

from graphopt.analysis.activation_places import places_of
from graphopt.analysis.weights import find_weights
from graphopt.config.selection import ModuleFrame
from graphopt.errors import CompressionError, ConfigError
from graphopt.ir import op_info
from graphopt.ir.annotations import (
    ActivationPoint,
    is_fused_norm,
    quantization_annotation,
)
from graphopt.ir.editor import Editor
from graphopt.ir.module_frames import module_frames
from graphopt.numerics.affine import has_whole_offsets
from graphopt.passes.annotate_quantization import AnnotateQuantization
from graphopt.passes.fold_batchnorm import conv_state
from graphopt.passes.pass_base import Pass
from graphopt.passes.restore_training import RestoreTraining, norm_momentum
from graphopt.prepared import (
    QUANTIZERS,
    ActivationQuantizer,
    ConvNorm,
    Origin,
    WeightQuantizer,
)
from graphopt.schemes.quantize import plan_blocks
from graphopt.specs import PerChannelGranularity
from graphopt.specs.granularity import value_block_sizes

__all__ = ["InsertFakeQuantize", "block_sizes", "place_behind", "redirect"]


@dataclass(frozen=True)
class InsertFakeQuantize(Pass):
    """Insert a quantizer at every annotated weight and activation.

    Before:
        %y = conv2d(%x, %w, %b)
        %n = _native_batch_norm_legit_no_training(%y, …)
        %i = getitem(%n, 0)
        %r = relu(%i)

    After:
        %xq = _quantizers.x(%x)
        %i = _quantizers.conv_norm_y(%xq, %w, %b, …)
        %r = relu(%i)
        %rq = _quantizers.relu(%r)

    A norm that is not folded and a dropout become modules too, so that `train()` reaches them.

    Examples:
        >>> from graphopt.passes import AnnotateQuantization
        >>> from graphopt.quantization import QuantizerConfig
        >>> gm = program.graph_module
        >>> _ = AnnotateQuantization(QuantizerConfig())(gm), InsertFakeQuantize()(gm)
        >>> [node.target for node in gm.graph.nodes if node.op == "call_module"]
        ['_quantizers.of_0_weight', '_quantizers.of_2_weight', '_quantizers.at_input_1', '_quantizers.at_relu']
    """

    name: ClassVar[str] = "insert-fake-quantize"
    tolerance: ClassVar[float | None] = None
    after: ClassVar[tuple[type[Pass], ...]] = (AnnotateQuantization,)

    @override
    def run(self, edit: Editor) -> None:
        weights = _weight_quantizers(edit)
        for point, operand, users in places_of(edit.gm):
            if point.derived and not _leaves_steps(operand, point):
                continue
            path = f"{QUANTIZERS}.at_{point.group}"
            path = edit.module(path, _activation_quantizer(edit, path, point, operand))
            readers = set(operand.users)
            rounded = edit.run_module(path, operand, place=place_behind(operand), like=operand)
            redirect(edit, operand, rounded, readers, users)
        for norm in edit.calls(op_info.BATCH_NORM):
            _insert_norm(edit, norm, weights)
        for node, quantizer in weights.items():
            _insert_weight(edit, node, quantizer)
        RestoreTraining().run(edit)


def _leaves_steps(operand: fx.Node, point: ActivationPoint) -> bool:
    """Whether an op that hands on rounded values bounds them between two steps, as `clamp` does."""
    info = op_info.info_of(operand)
    bounds = None if info is None else info.activation
    if bounds is None or point.spec.dynamic:
        return False
    return not (bounds.homogeneous and has_whole_offsets(point.spec))


def redirect(
    edit: Editor,
    operand: fx.Node,
    rounded: fx.Node,
    readers: set[fx.Node],
    users: tuple[tuple[fx.Node, int], ...] | None,
) -> None:
    """Let the readers of a value read its rounded form.

    Args:
        edit: The editor.
        operand: The value.
        rounded: Its rounded form.
        readers: What read it before it was rounded.
        users: (reader, operand position) of those that are to change; None for all.
    """
    if users is None:
        edit.redirect(operand, rounded, lambda user: user not in readers or _is_shape_query(user))
        return
    for node, position in users:
        edit.set_operand(node, position, rounded)


def _is_shape_query(node: fx.Node) -> bool:
    info = op_info.info_of(node)
    return info is not None and info.shape_query


def place_behind(node: fx.Node) -> fx.Node:
    """The node before which something that reads `node` can stand."""
    place = node.next
    while place.op == "placeholder" or (
        node.target is not operator.getitem
        and place.target is operator.getitem
        and place.args[0] is node
    ):
        place = place.next
    return place


def _activation_quantizer(
    edit: Editor, path: str, point: ActivationPoint, operand: fx.Node
) -> nn.Module:
    try:
        return edit.gm.get_submodule(path)
    except AttributeError:
        pass
    groups = 1
    granularity = point.spec.granularity
    if point.spec.dynamic:
        block_sizes(point, operand)
    elif isinstance(granularity, PerChannelGranularity) and granularity.axis is not None:
        shape = operand.meta["val"].shape
        if not -len(shape) <= granularity.axis < len(shape):
            raise CompressionError(
                f"{operand.name}: {point.path} has axis {granularity.axis}, the value has rank"
                f" {len(shape)}"
            )
        extent = shape[granularity.axis]
        # a symbol here has this value wherever the graph is valid, or the scales will not fit
        groups = extent if isinstance(extent, int) else int(extent.node.hint)
    quantizer = ActivationQuantizer(point.spec, groups)
    quantizer.origin = Origin(point.group, _owner(module_frames(operand)), point.path)
    quantizer.eval()
    return quantizer


def block_sizes(point: ActivationPoint, operand: fx.Node) -> tuple[int, ...]:
    """Blocks of a value whose scales are computed from each tensor, see `value_block_sizes`.

    Raises:
        CompressionError: They do not fit its shape.
    """
    shape = operand.meta["val"].shape
    # a symbol may stand for one size that the graph was found to need
    known = [size if isinstance(size, int) else size.node.maybe_as_int() or size for size in shape]
    try:
        return value_block_sizes(point.spec.granularity, known)
    except ConfigError as error:
        raise CompressionError(f"{operand.name} ({point.path}): {error}") from None


def _owner(frames: tuple[ModuleFrame, ...]) -> str:
    return frames[-1].name if frames else ""


def _weight_quantizers(edit: Editor) -> dict[fx.Node, tuple[WeightQuantizer, str]]:
    """One quantizer per weight, for all nodes that read it."""
    quantizers: dict[fx.Node, tuple[WeightQuantizer, str]] = {}
    for weight in find_weights(edit.gm):
        annotation = quantization_annotation(weight.nodes[0])
        if annotation is None:
            continue
        blocks, _ = plan_blocks(
            weight.tensor.shape, annotation.output_axis, annotation.spec.granularity
        )
        quantizer = WeightQuantizer(annotation.spec, blocks, weight.tensor.dtype)
        quantizer.origin = Origin(weight.name, _owner(weight.uses[0].frames), annotation.path)
        quantizer.eval()
        for node in weight.nodes:
            quantizers[node] = (quantizer, f"{QUANTIZERS}.of_{weight.name.replace('.', '_')}")
    return quantizers


def _insert_norm(
    edit: Editor,
    norm: fx.Node,
    weights: dict[fx.Node, tuple[WeightQuantizer, str]],
) -> None:
    eps = op_info.eps_of(norm)
    conv = norm.args[0]
    item = next((u for u in norm.users if u.target is operator.getitem and u.args[1] == 0), None)
    if item is None:
        return
    if not is_fused_norm(norm) or not isinstance(conv, fx.Node):
        return
    _, groups = conv_state(edit, norm, conv)
    x, weight = conv.args[0], conv.args[1]
    bias = conv.args[2] if len(conv.args) > 2 else None
    assert isinstance(weight, fx.Node)
    quantizer = weights[weight][0] if weight in weights else None
    momentum, tracked = norm_momentum(edit, norm)
    module = ConvNorm(conv.target, tuple(conv.args[3:]), groups, momentum, eps, quantizer)  # type: ignore[arg-type]
    module.eval()
    if quantizer is not None:
        state, _ = conv_state(edit, norm, conv)
        stored_bias = None if bias is None else edit.value(bias)  # type: ignore[arg-type]
        with torch.no_grad():
            quantizer.start(module.folded(edit.value(weight), stored_bias, state)[0])
        weights.pop(weight)
    path = edit.module(f"{QUANTIZERS}.norm_{conv.name}", module)
    given = (x, weight, bias, *norm.args[1:5], *tracked)
    made = edit.run_module(path, *given, place=norm, like=item)
    edit.replace(item, made)
    _erase(edit, norm)
    edit.erase(conv)


def _erase(edit: Editor, norm: fx.Node) -> None:
    for user in list(norm.users):
        edit.erase(user)
    edit.erase(norm)


def _insert_weight(edit: Editor, node: fx.Node, placed: tuple[WeightQuantizer, str]) -> None:
    quantizer, path = placed
    quantizer.start(edit.value(node))
    path = edit.module(path, quantizer)
    rounded = edit.run_module(path, node, place=node.next, like=node)
    edit.redirect(node, rounded, lambda _: False)
