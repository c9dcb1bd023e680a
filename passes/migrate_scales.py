"""Move ranges of channels to where they do no harm."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from graphopt.analysis.migrations import Migration, Reader, find_migrations
from graphopt.fitting.migration import (
    Factors,
    choose_factors,
    column_factors,
    observe_migrations,
    trust,
)
from graphopt.ir import op_info
from graphopt.ir.annotations import clear_annotations, mark_rescaled, move_output, output_point
from graphopt.ir.captured_module import callable_graph
from graphopt.ir.editor import Editor
from graphopt.passes.annotate_quantization import AnnotateQuantization
from graphopt.passes.pass_base import Pass
from graphopt.run.calibration_data import read_calls

__all__ = ["MigrateScales"]

_log = logging.getLogger(__name__)
_ADD, _MUL = torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor


@dataclass(frozen=True)
class MigrateScales(Pass):
    """Scale and shift channels of values that are rounded, and undo it where they are read, exactly.

    Before:
        %n = layer_norm(%x, [c], %gamma, %beta)
        %y = linear(%n, %w, %b)
        %r = add(%n, %z)

    After:
        %n = layer_norm(%x, [c], %gamma / s, (%beta − δ) / s)
        %y = linear(%n, %w · diag(s), %b + %w · δ)
        %m = mul(%n, s)
        %k = add(%m, δ)
        %r = add(%k, %z)

    The same holds behind ops with weights, whose rows take the scales up where only functions that
    commute with scaling lie between them and their readers, or attention, which is linear in its
    values: heads that share values share their scales. Behind other activation functions and
    products in front of linear layers one multiplication by a constant is added. A result that a
    target must round though only a norm reads it is balanced by its rows, and multiplied back behind
    the rounding. Scales are those of least error at the readers' outputs
    (`graphopt.fitting.migration`). With fewer than 16 samples they shrink towards one, which they are
    for a single sample.

    Attributes:
        data: Inputs of one call each, as for `as_batch`; without data nothing changes.

    Examples:
        >>> from graphopt.passes import AnnotateQuantization
        >>> from graphopt.quantization import QuantizerConfig
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.logspace(-2, 2, 16))
        >>> rows = torch.randn(64, 16)
        >>> gm = graphopt.capture(net, rows).graph_module
        >>> _ = AnnotateQuantization(QuantizerConfig.presets.w8a8_affine())(gm)
        >>> MigrateScales([rows])(gm).modified
        True
    """

    name: ClassVar[str] = "migrate-scales"
    after: ClassVar[tuple[type[Pass], ...]] = (AnnotateQuantization,)
    tolerance: ClassVar[float | None] = 1e-4
    data: Sequence[Any] | None = None

    @override
    def run(self, edit: Editor) -> None:
        if not self.data:
            return
        gm = callable_graph(edit.gm)
        migrations = find_migrations(gm)
        if not migrations:
            return
        observations = observe_migrations(gm, migrations, list(read_calls(gm, self.data)))
        # what one migration scales another may read: all are chosen before any is changed
        chosen = [
            (migration, choose_factors(gm, migration, seen, trust(seen.count)))
            for migration, seen in zip(migrations, observations, strict=True)
            if bool((seen.low <= seen.high).all())
        ]
        for migration, factors in chosen:
            _log.debug(
                "%s (%s): α %g, error %.3g → %.3g",
                migration.producer.node.name,
                migration.producer.kind,
                factors.strength,
                factors.before,
                factors.error,
            )
            if factors.error < factors.before:
                _Move(edit, migration, factors).apply()


@dataclass(frozen=True)
class _Move:
    edit: Editor
    migration: Migration
    factors: Factors

    def apply(self) -> None:
        producer, scale, shift = self.migration.producer, self.factors.scale, self.factors.shift
        scaled: fx.Node = producer.node
        back: fx.Node | None = None
        if producer.kind == "norm":
            assert producer.affine is not None
            gain, offset = producer.affine.gain, producer.affine.shift
            self._set(gain, self._of(gain) / scale)
            if offset is not None:
                moved = self._of(offset) if shift is None else self._of(offset) - shift
                self._set(offset, moved / scale)
            back = self._give_back()
        elif producer.kind == "rows":
            self._scale_rows()
            back = self._give_back()
        else:
            scaled = self._multiply()
        for reader in self.migration.readers:
            self._take_up(reader)
        self._mark(scaled, back)

    def _mark(self, scaled: fx.Node, back: fx.Node | None) -> None:
        """Mark the values that are scaled now, up to what scales them back."""
        ends = {back, *(reader.node for reader in self.migration.readers)}
        pending, seen = [scaled], set[fx.Node]()
        while pending:
            node = pending.pop()
            if node in seen or node in ends:
                continue
            seen.add(node)
            mark_rescaled(node)
            pending += list(node.users)

    def _of(self, node: fx.Node) -> Tensor:
        return self.edit.value(node).detach().double()

    def _set(self, node: fx.Node, value: Tensor, tied: Sequence[fx.Node] = ()) -> None:
        self.edit.set_value(node, value.to(self.edit.value(node).dtype), tied=tied)

    def _scale_rows(self) -> None:
        producer, scale = self.migration.producer, self.factors.scale
        assert producer.weight is not None
        assert producer.use is not None
        stored, *tied = producer.weight.nodes
        exact = self._of(stored)
        matrix = producer.use.matrix(torch.ones_like(exact), casts=False)
        if producer.part is not None:
            rows = torch.ones(matrix.shape[0] * matrix.shape[1], dtype=torch.float64)
            scale = rows.index_copy(0, producer.part, scale.double())
        rows = scale.double().reshape(matrix.shape[0], matrix.shape[1], 1).expand_as(matrix)
        factors = producer.use.pull_back(rows.contiguous(), exact.shape)
        self._set(stored, exact / factors, tied)
        if producer.bias is not None:
            self._set(producer.bias, self._of(producer.bias) / scale)

    def _wide(self, values: Tensor) -> Tensor:
        """Values per channel, to be broadcast against the migration's value."""
        value = self.migration.value.meta["val"]
        behind = value.ndim - 1 - self.migration.axis % value.ndim
        return values.to(value.dtype).reshape(-1, *[1] * behind)

    def _give_back(self) -> fx.Node | None:
        """Let other readers of a value read what it was before; the first op that scales it back."""
        node, others = self.migration.value, set(self.migration.others)
        if not others:
            return None
        place = node.next
        scale = self.edit.constant(
            f"{node.name}_scale", self._wide(self.factors.scale), like=node, before=place
        )
        mark_rescaled(scale)
        first = back = self.edit.call(_MUL, node, scale, like=node, before=place)
        if self.factors.shift is not None:
            shift = self.edit.constant(
                f"{node.name}_shift", self._wide(self.factors.shift), like=node, before=place
            )
            mark_rescaled(shift)
            back = self.edit.call(_ADD, back, shift, like=node, before=place)
        self.edit.redirect(node, back, lambda user: user not in others)
        return first

    def _multiply(self) -> fx.Node:
        """Put a multiplication behind a value; returns it."""
        node, taken = self.migration.producer.node, set(self.migration.taken)
        place = node.next
        factor = self.edit.constant(
            f"{node.name}_scale", self._wide(1 / self.factors.scale), like=node, before=place
        )
        mark_rescaled(factor)
        made = self.edit.call(_MUL, node, factor, like=node, before=place)
        if output_point(node) is not None:
            move_output(node, made)
            clear_annotations(node)
        self.edit.redirect(node, made, lambda user: user not in taken)
        return made

    def _take_up(self, reader: Reader) -> None:
        stored, *tied = reader.weight.nodes
        exact, shift = self._of(stored), self.factors.shift
        if shift is not None:
            self._shift_bias(reader, reader.use.operand(exact, casts=False) @ shift.double())
        scale = reader.by_column(self.factors.scale.double())
        factors = column_factors(reader.use, exact.shape, scale)
        self._set(stored, exact * factors, tied)

    def _shift_bias(self, reader: Reader, change: Tensor) -> None:
        node = reader.node
        info = op_info.info_of(node)
        assert info is not None
        slot = info.slot(reader.use.position)
        assert slot is not None
        assert slot.bias is not None
        bias = op_info.argument(node, slot.bias)
        if isinstance(bias, fx.Node):
            self._set(bias, self._of(bias) + change)
            return
        owner = reader.weight.name.rpartition(".")[0]
        value = change.to(reader.weight.tensor.dtype)
        made = self.edit.constant(f"{owner}.bias" if owner else "bias", value, like=node)
        self.edit.set_args(node, (*node.args[: slot.bias], made, *node.args[slot.bias + 1 :]))
