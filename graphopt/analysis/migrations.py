"""Values whose channels can be scaled where they are made and scaled back where they are read."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, fx

from graphopt.analysis.channel_flow import channel_axis_behind, extent_of
from graphopt.analysis.channel_labels import labels_behind, labels_of
from graphopt.analysis.matrix_form import WeightUse, weight_uses
from graphopt.analysis.value_facts import data_values, is_float, only_user
from graphopt.analysis.weights import WeightTensor, find_weights
from graphopt.ir import op_info
from graphopt.ir.annotations import ActivationPoint, input_points, output_point
from graphopt.ir.editor import operands
from graphopt.ir.op_info import Scales
from graphopt.specs import PerTensorGranularity

__all__ = ["Affine", "Migration", "Producer", "Reader", "find_migrations"]


@dataclass(frozen=True)
class Affine:
    """A gain per channel, and perhaps a shift, that the graph applies.

    Attributes:
        gain: The gain's constant.
        shift: The shift's, None where there is none.
    """

    gain: fx.Node
    shift: fx.Node | None


@dataclass(frozen=True)
class Producer:
    """Where the channels of a value can be scaled.

    Attributes:
        node: The value.
        kind: "norm" (gain and shift take the factors up), "rows" (a weight's rows and bias do) or
            "product" (a multiplication has to be added).
        affine: Of a norm, or of the batch norm behind the op with the rows.
        weight: Whose rows are scaled, where no norm stands behind them.
        use: How the op reads that weight.
        bias: Its bias, scaled alike.
        part: Which of its rows are scaled, [channels]; None where all are.
    """

    node: fx.Node
    kind: Literal["norm", "rows", "product"]
    affine: Affine | None = None
    weight: WeightTensor | None = None
    use: WeightUse | None = None
    bias: fx.Node | None = None
    part: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Reader:
    """An op with a weight whose columns scale the channels back.

    Attributes:
        node: The op.
        operand: What it reads.
        axis: Axis of the channels there.
        weight: Its weight, which nothing else reads.
        use: How it reads it.
        point: How what it reads is rounded.
        channels: Channel of the migration that each of its columns belongs to; None where they are
            the same.
    """

    node: fx.Node
    operand: fx.Node
    axis: int
    weight: WeightTensor
    use: WeightUse
    point: ActivationPoint
    channels: Tensor | None = field(default=None, compare=False)

    def by_column(self, values: Tensor) -> Tensor:
        """Values of channels, for each column."""
        return values if self.channels is None else values[self.channels]

    def by_channel(self, columns: Tensor, count: int) -> Tensor:
        """The largest value among the columns of each of so many channels; −∞ where there is none."""
        if self.channels is None:
            return columns
        start = columns.new_full((count,), -torch.inf)
        return start.scatter_reduce(0, self.channels, columns, "amax")


@dataclass(frozen=True)
class Migration:
    """One value that can be scaled, its readers, and what else reads it.

    Attributes:
        producer: Where it is scaled.
        value: The value, or the view or copy of it that alone reads it.
        channels: Number of its channels.
        axis: Their axis in `value`.
        readers: Ops that take the factors up; none where the value is only balanced: it is rounded
            for all that read it, which read it as it was.
        taken: Direct readers of the value behind which only `readers` stand.
        others: Direct readers that need the value as it was.
        shifts: Whether channels can be shifted as well, exactly.
    """

    producer: Producer
    value: fx.Node
    channels: int
    axis: int
    readers: tuple[Reader, ...]
    taken: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]
    shifts: bool

    @property
    def operands(self) -> dict[fx.Node, int]:
        """What is rounded → axis of its channels."""
        if not self.readers:
            return {self.value: self.axis}
        return {reader.operand: reader.axis for reader in self.readers}


def find_migrations(gm: fx.GraphModule) -> list[Migration]:
    """All migrations of an annotated graph, in its order; each weight's columns belong to one.

    A migration is taken where its readers round what they read: at norms (LayerNorm, RMSNorm, GroupNorm,
    batch norms), behind ops with weights where only functions that commute with scaling follow, at
    the values of attention, which the output projection reads head by head, and behind other
    activation functions and products of two values in front of linear layers.
    """
    return list(_Finder(gm).migrations())


@dataclass
class _Found:
    readers: list[Reader] = field(default_factory=list)
    taken: list[fx.Node] = field(default_factory=list)
    others: list[fx.Node] = field(default_factory=list)
    straight: bool = True  # no function that a shift does not pass


class _Finder:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.data = data_values(gm)
        weights = [w for w in find_weights(gm) if not w.compressed and w.sparse is None]
        self.weights = {weight.name: weight for weight in weights}
        self.uses: dict[fx.Node, tuple[WeightTensor, WeightUse]] = {}
        for name, uses in weight_uses(gm, weights).items():
            if len(uses) == 1 and not self.weights[name].data_like:
                self.uses[uses[0].node] = self.weights[name], uses[0]
        self.names = Counter(str(node.target) for node in gm.graph.find_nodes(op="get_attr"))

    def migrations(self) -> Iterator[Migration]:
        for node in self.gm.graph.nodes:
            if node.op != "call_function" or not is_float(node) or node not in self.data:
                continue
            producer, axis = self._producer(node)
            channels = None if producer is None else extent_of(node, axis)
            if producer is None or channels is None:
                continue
            point = output_point(node)
            if point is not None and point.balanced:
                if producer.kind == "rows":
                    yield Migration(
                        producer, node, channels, axis, (), (), tuple(node.users), False
                    )
                continue
            value, axis = self._last_form(node, axis) if producer.kind == "norm" else (node, axis)
            found = self._behind(value, axis)
            if not found.readers or not self._allowed(producer, found, channels):
                values = self._values(producer, axis) if producer.kind == "rows" else None
                if values is not None:
                    yield values
                continue
            yield Migration(
                producer,
                value,
                channels,
                axis,
                tuple(found.readers),
                tuple(found.taken),
                tuple(found.others),
                found.straight and self._takes_shifts(producer, found.readers),
            )

    def _last_form(self, node: fx.Node, axis: int) -> tuple[fx.Node, int]:
        """A value behind the views and dropouts that alone read it one after the other."""
        while (user := only_user(node)) is not None and user not in self.uses:
            info = op_info.info_of(user)
            behind = channel_axis_behind(user, node, axis)
            if behind is None or info is None or info.activation is not None:
                break
            node, axis = user, behind
        return node, axis

    def _takes_shifts(self, producer: Producer, readers: list[Reader]) -> bool:
        if producer.affine is None or producer.affine.shift is None:
            return False
        return all(
            reader.use.form.kind == "linear" and self._has_bias(reader) for reader in readers
        )

    def _has_bias(self, reader: Reader) -> bool:
        """Whether a constant can be added to the op's results within it."""
        info = op_info.info_of(reader.node)
        slot = None if info is None else info.slot(reader.use.position)
        if slot is None or slot.bias is None:
            return False
        bias = op_info.argument(reader.node, slot.bias)
        return bias is None or self._own(bias, reader.node)

    # --- producers ------------------------------------------------------------------------------
    def _producer(self, node: fx.Node) -> tuple[Producer | None, int]:
        if node.target is operator.getitem:
            norm = node.args[0]
            if op_info.is_batch_norm(norm) and node.args[1] == 0:
                assert isinstance(norm, fx.Node)
                affine = self._affine_of(norm)
                return (None if affine is None else Producer(node, "norm", affine)), 1
            return None, 0
        info = op_info.info_of(node)
        if info is None:
            return None, 0
        if info.norm is not None and info.batch_norm is None:
            affine = self._affine_of(node)
            return (None if affine is None else Producer(node, "norm", affine)), info.norm.axis
        if node in self.uses:
            return self._rows(node)
        gain = self._written_gain(node)
        if gain is not None:
            return Producer(node, "norm", Affine(gain, None)), -1
        known = info.activation is not None and not info.activation.homogeneous
        joined = info.both_data and info.arithmetic and info.scales is Scales.COMPUTE
        product = joined and not info.sums and info.names[0] == "mul"
        both = sum(operand in self.data for operand in operands(node)) == 2
        if (known and info.scales is Scales.FLOAT) or (product and both):
            return Producer(node, "product"), -1
        return None, 0

    def _affine_of(self, norm: fx.Node) -> Affine | None:
        info = op_info.info_of(norm)
        assert info is not None
        assert info.norm is not None
        gain = op_info.argument(norm, info.norm.gain)
        shift = op_info.argument(norm, info.norm.shift)
        if not self._own(gain, norm) or (shift is not None and not self._own(shift, norm)):
            return None
        return Affine(gain, shift)

    def _own(self, node: object, reader: fx.Node) -> bool:
        """Whether a vector is stored for one reader alone."""
        if not isinstance(node, fx.Node) or node.op != "get_attr" or set(node.users) != {reader}:
            return False
        value = node.meta.get("val")
        # captures tie vectors of equal values, which may part again
        return isinstance(value, Tensor) and value.ndim == 1 and self.names[str(node.target)] == 1

    def _written_gain(self, node: fx.Node) -> fx.Node | None:
        """The gain of a norm that is written as a product with a stored vector."""
        info = op_info.info_of(node)
        if info is None or info.names[0] != "mul" or len(node.args) != 2:
            return None
        for own, other in (node.args, reversed(node.args)):
            if self._own(own, node) and isinstance(other, fx.Node) and other in self.data:
                assert isinstance(own, fx.Node)
                fits = extent_of(own, 0) == extent_of(node, -1)
                return own if fits else None
        return None

    def _rows(self, node: fx.Node) -> tuple[Producer | None, int]:
        weight, use = self.uses[node]
        info = op_info.info_of(node)
        assert info is not None
        slot = info.slot(use.position)
        if slot is None or use.form.kind not in ("linear", "conv"):
            return None, 0
        bias = op_info.argument(node, slot.bias)
        if bias is not None and not self._own(bias, node):
            return None, 0
        return Producer(node, "rows", None, weight, use, bias), slot.result_axis

    # --- readers --------------------------------------------------------------------------------
    def _behind(self, node: fx.Node, axis: int) -> _Found:
        """What reads a value, directly or through ops that keep its channels apart."""
        found = _Found()
        for user in list(node.users):
            if _asks(user):
                continue
            reader = self._reader(user, node, axis)
            if reader is not None:
                found.readers.append(reader)
                found.taken.append(user)
                continue
            further = self._through(user, node, axis)
            if further is None or further.others or not further.readers:
                found.others.append(user)
                continue
            found.readers += further.readers
            found.taken.append(user)
            found.straight &= further.straight
        return found

    def _through(self, user: fx.Node, node: fx.Node, axis: int) -> _Found | None:
        behind = channel_axis_behind(user, node, axis)
        if behind is None:
            return None
        found = self._behind(user, behind)
        info = op_info.info_of(user)
        if info is not None and info.activation is not None:
            found.straight = False
        return found

    def _reader(self, user: fx.Node, node: fx.Node, axis: int) -> Reader | None:
        if user not in self.uses:
            return None
        weight, use = self.uses[user]
        value = node.meta.get("val")
        if user.args[use.form.data] is not node or not isinstance(value, Tensor):
            return None
        wanted = {"linear": value.ndim - 1, "right": value.ndim - 1, "conv": 1}.get(use.form.kind)
        if wanted != axis % value.ndim:
            return None
        if use.form.kind == "conv" and value.ndim != len(use.form.kernel) + 2:
            return None
        place = operands(user).index(node)
        point = input_points(user).get(place) or output_point(node)
        if point is None or not isinstance(point.spec.granularity, PerTensorGranularity):
            return None
        return Reader(user, node, axis, weight, use, point)

    # --- values of attention --------------------------------------------------------------------
    def _values(self, producer: Producer, axis: int) -> Migration | None:
        """The rows of a weight that reach readers as channels which nothing else reads."""
        node = producer.node
        rows, value = extent_of(node, axis), node.meta["val"]
        if rows is None:
            return None
        labels = labels_of(rows, axis % value.ndim, value.ndim)
        found = list(self._labelled(node, labels))
        held = set[int]().union(*(each for each, reader in found if reader is None))
        reached = set[int]().union(*(each for each, reader in found if reader is not None))
        if not reached or reached & held:
            return None
        part = torch.tensor(sorted(reached))
        readers = tuple(
            replace(reader, channels=torch.searchsorted(part, reader.channels))
            for _, reader in found
            if reader is not None and reader.channels is not None
        )
        taken = tuple(user for user in node.users if not _asks(user))
        producer = replace(producer, part=part)
        return Migration(producer, node, len(part), axis, readers, taken, (), False)

    def _labelled(self, node: fx.Node, labels: Tensor) -> Iterator[tuple[set[int], Reader | None]]:
        """Sets of labels, each with a reader of them or None where something else reads them."""
        for user in node.users:
            if _asks(user):
                continue
            wide = [axis for axis, size in enumerate(labels.shape) if size > 1]
            reader = self._reader(user, node, wide[0]) if len(wide) == 1 else None
            if reader is not None:
                columns = labels.reshape(-1)
                yield set(columns.tolist()), replace(reader, channels=columns)
                continue
            behind = labels_behind(user, node, labels)
            if behind is None:
                yield set(labels.reshape(-1).tolist()), None
            else:
                yield from self._labelled(user, behind)

    def _allowed(self, producer: Producer, found: _Found, channels: int) -> bool:
        if any(extent_of(r.operand, r.axis) != channels for r in found.readers):
            return False
        if producer.kind == "norm":
            return found.straight or not found.others
        if producer.kind == "rows":
            return not found.others
        if any(reader.use.form.kind != "linear" for reader in found.readers):
            return False
        # what others read is rounded where this value is
        return not found.others or output_point(producer.node) is None


def _asks(node: fx.Node) -> bool:
    info = op_info.info_of(node)
    return info is not None and (info.shape_query or info.check is not None)
