"""Which scales and shifts of channels make rounding cheapest where a value is read.

For a value x with channels c the graph computes `z = (x − δ) / s` instead, and its readers
`W·diag(s)·z + (b + W·δ)`; behind attention several columns may share one s.
δ is the middle of each channel's range (Wei et al., Outlier Suppression+,
arXiv 2304.09145, section 4.1); s is `max|x − δ|^α / max|W|^(1 − α)` (Xiao et al., SmoothQuant, arXiv
2211.10438, equation 4), which for α = ½ is the equalization of two layers (Nagel et al., Data-free
quantization, arXiv 1906.04721, equation 11). α is that of the least error at the outputs of all
readers, with rounded values and rounded weights, none among the candidates. Ranges are of one half
of the samples there and errors of the other: equal ranges put every channel at its limit, where
values that were not seen are cut off. Narrower values and wider weights trade noise, which later averages
take out, for errors that all positions share; where weights are rounded to nearest, nothing makes up for
those, and they count more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.matrix_form import WeightUse
from graphopt.analysis.migrations import Migration, Reader
from graphopt.ir.annotations import quantization_annotation
from graphopt.ir.captured_module import CapturedModule
from graphopt.numerics.affine import dequantize, grid_of, has_whole_offsets, qparams, quantize
from graphopt.numerics.sums import sum_of_squares
from graphopt.observers import observer_of
from graphopt.run.batches import Batch
from graphopt.run.interpreter import Interpreter, constant_value, evaluate
from graphopt.schemes.quantize import plan_blocks, quantize_weight
from graphopt.specs import QuantizationSpec

__all__ = ["Factors", "choose_factors", "column_factors", "observe_migrations", "trust"]

_STRENGTHS = (0.5, 0.75, 1.0)
_ROWS = 1024  # positions of a linear layer's inputs that errors are measured on
_ELEMENTS = 1 << 20  # elements of a convolution's inputs that errors are measured on
_FLOOR = 1e-2  # of the mean range: what a channel that was hardly seen counts
_GAIN = 0.9  # a change must take this share off the error
_SHARED = 4.0  # times that an error which all positions share counts where no bias makes up for it
ENOUGH = 16  # samples from which on the data are trusted in full


@dataclass(frozen=True)
class Factors:
    """What becomes of a migration.

    Attributes:
        scale: s of each channel, float32.
        shift: δ of each channel, or None.
        error: Relative squared error at the readers' outputs.
        before: That without any change.
        strength: α.
    """

    scale: Tensor
    shift: Tensor | None
    error: float
    before: float
    strength: float


@dataclass
class Observation:
    """What was seen of a migration.

    Attributes:
        low: Smallest value of each channel; behind attention that of the values it averages.
        high: Largest.
        fit_low: Smallest value of each channel in the half of the data that ranges are judged with.
        fit_high: Largest there.
        samples: Some of each reader's operand in the other half, by its node.
        count: Samples that were seen in all.
    """

    low: Tensor
    high: Tensor
    fit_low: Tensor
    fit_high: Tensor
    samples: dict[fx.Node, list[Tensor]] = field(default_factory=dict)
    count: int = 0


def trust(samples: int) -> float:
    """How far to go on the word of few samples: 0 for one, 1 from `ENOUGH` on."""
    return min(1.0, math.log2(max(samples, 1)) / math.log2(ENOUGH))


def observe_migrations(
    gm: CapturedModule, migrations: Sequence[Migration], batches: Sequence[Batch]
) -> list[Observation]:
    """Ranges of every migration's channels, and samples of what its readers read, in one run."""
    interpreter = Interpreter(gm)
    seen = [_nothing_seen(migration.channels) for migration in migrations]
    hooks: dict[fx.Node, list[tuple[Observation, Migration]]] = {}
    for migration, observation in zip(migrations, seen, strict=True):
        values = {} if migration.producer.part is None else {migration.value: 0}
        for operand in {**values, **migration.operands}:
            hooks.setdefault(operand, []).append((observation, migration))

    def watch(node: fx.Node, value: Tensor) -> Tensor:
        for observation, migration in hooks[node]:
            _take(observation, migration, node, value.detach(), len(batches))
        return value

    behind = {node: (lambda value, node=node: watch(node, value)) for node in hooks}
    with torch.no_grad():
        for batch in batches:
            interpreter.run(batch, behind)
    return seen


def _nothing_seen(channels: int) -> Observation:
    low, high = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
    return Observation(low, high, low.clone(), high.clone())


def _take(
    observation: Observation, migration: Migration, node: fx.Node, value: Tensor, calls: int
) -> None:
    if value.numel() == 0:
        return
    # attention's values are rounded themselves, and hold what is averaged of them
    averaged = migration.producer.part is not None and node is not migration.value
    if not averaged:
        low, high = _channel_ends(migration, node, value)
        observation.low = torch.minimum(observation.low, low)
        observation.high = torch.maximum(observation.high, high)
    # a call of one sample belongs to one half, the first one to that of the errors
    half = len(value) // 2 if len(value) > 1 else (observation.count + 1) % 2
    fit, value = value[half:], value[:half]
    if len(fit) and not averaged:
        low, high = _channel_ends(migration, node, fit)
        observation.fit_low = torch.minimum(observation.fit_low, low)
        observation.fit_high = torch.maximum(observation.fit_high, high)
    if node not in migration.operands:
        return
    kept = observation.samples.setdefault(node, [])
    if node is next(iter(observation.samples)):
        observation.count += len(fit) + len(value)
    if not len(value):
        return
    kinds = {reader.use.form.kind for reader in migration.readers if reader.operand is node}
    if not kinds:
        return
    if "conv" in kinds:
        room = max(1, _ELEMENTS // calls // max(value[0].numel(), 1))
        kept += [value[:room].clone()] if sum(map(torch.numel, kept)) < 2 * _ELEMENTS else []
        return
    rows = value.reshape(-1, value.shape[-1])
    step = max(1, rows.shape[0] * calls // _ROWS)
    kept.append(rows[len(kept) % step :: step].clone())


def _channel_ends(migration: Migration, node: fx.Node, value: Tensor) -> tuple[Tensor, Tensor]:
    axis, part = migration.operands.get(node, migration.axis), migration.producer.part
    rows = value.movedim(axis, 0).flatten(1)
    low, high = torch.aminmax((rows if part is None else rows[part]).float(), dim=1)
    return low, high


def column_factors(use: WeightUse, shape: Sequence[int], factors: Tensor) -> Tensor:
    """Factors of input channels as factors of a stored weight's elements.

    Args:
        use: How an op reads the weight.
        shape: Shape of the stored weight.
        factors: One per channel that the op reads.
    """
    form = use.form
    probe = use.matrix(torch.zeros(list(shape)), casts=False)
    groups, rows, columns = probe.shape
    if form.kind == "conv":
        spread = factors.reshape(groups, -1).repeat_interleave(math.prod(form.kernel), dim=1)
    else:
        spread = factors.reshape(1, columns)
    return use.pull_back(spread[:, None].expand(groups, rows, columns).contiguous(), shape)


def choose_factors(
    gm: CapturedModule, migration: Migration, seen: Observation, share: float
) -> Factors:
    """The best scales and shifts of a migration; scales of one where nothing is better by much.

    Args:
        gm: The graph.
        migration: The migration.
        seen: From `observe_migrations`.
        share: From `trust`: how far scales and shifts may go.
    """
    ones = torch.ones(migration.channels)
    if not migration.readers:
        reach = _floored(torch.maximum(seen.low.abs(), seen.high.abs()))
        return Factors(((reach / reach.max()).log() * share).exp(), None, 0.0, 1.0, 1.0)
    held = all(seen.samples.get(reader.operand) for reader in migration.readers)
    if share <= 0 or not held or not bool((seen.fit_low <= seen.fit_high).all()):
        return Factors(ones, None, 0.0, 0.0, 0.0)
    judge = _Judge(gm, migration, seen)
    magnitudes = judge.column_magnitudes()
    before = judge.error(ones, None)
    least, chosen = before, (0.0, False)
    for shifted in (False, True) if migration.shifts else (False,):
        for strength in (*_STRENGTHS, *((0.0,) if shifted else ())):
            ends = seen.fit_low, seen.fit_high
            error = judge.error(*_factors(ends, magnitudes, strength, shifted, share))
            if error < least:
                least, chosen = error, (strength, shifted)
    if least >= _GAIN * before:
        return Factors(ones, None, before, before, 0.0)
    scale, shift = _factors((seen.low, seen.high), magnitudes, *chosen, share)
    return Factors(scale, shift, least, before, chosen[0])


def _factors(
    ends: tuple[Tensor, Tensor], magnitudes: Tensor, strength: float, shifted: bool, share: float
) -> tuple[Tensor, Tensor | None]:
    """Scales and shifts by the ranges of the channels and of the weights that read them."""
    low, high = ends
    shift = (low + high) / 2 * share if shifted else None
    if not strength:
        return torch.ones_like(low), shift
    if shift is not None:
        low, high = low - shift, high - shift
    reach = _floored(torch.maximum(low.abs(), high.abs()))
    log = strength * reach.log() - (1 - strength) * magnitudes.log()
    return ((log - log.mean()) * share).exp(), shift


def _floored(reach: Tensor) -> Tensor:
    return reach.clamp_min(_FLOOR * float(reach.mean())).clamp_min(1e-12)


def _counted(reader: Reader, error: Tensor) -> float:
    """The squared error at a reader's outputs, what all positions share of it counted as it harms."""
    annotation = quantization_annotation(reader.weight.nodes[0])
    squares = sum_of_squares(error)
    if annotation is None or annotation.spec.algorithm != "nearest" or not squares:
        return squares  # error feedback fits the bias as well
    form = reader.use.form
    axis = error.ndim - 1 - (len(form.kernel) if form.kind == "conv" else 0)
    means = error.movedim(axis, 0).flatten(1).double().mean(1)
    shared = float(means.square().sum()) * (error.numel() // error.shape[axis])
    return squares + (_SHARED - 1) * shared


class _Judge:
    """Errors at the outputs of its readers."""

    def __init__(self, gm: CapturedModule, migration: Migration, seen: Observation) -> None:
        self.gm, self.migration, self.seen = gm, migration, seen
        self.samples = {node: torch.cat(kept) for node, kept in seen.samples.items()}
        self.exact: dict[tuple[fx.Node, bool], Tensor] = {}
        self.energies: dict[tuple[fx.Node, bool], float] = {}

    def column_magnitudes(self) -> Tensor:
        """Largest magnitude of the weights that read each channel."""
        largest = torch.zeros(self.migration.channels)
        for reader in self.migration.readers:
            matrix = reader.use.matrix(reader.weight.tensor.detach().float(), casts=False)
            per_column = matrix.abs().amax(1)  # groups × columns
            if reader.use.form.kind == "conv":
                size = math.prod(reader.use.form.kernel)
                per_column = per_column.reshape(per_column.shape[0], -1, size).amax(2)
            largest = torch.maximum(
                largest, reader.by_channel(per_column.reshape(-1), len(largest))
            )
        return largest.clamp_min(1e-3 * float(largest.mean())).clamp_min(1e-12)

    def error(self, scale: Tensor, shift: Tensor | None) -> float:
        """Squared error relative to the outputs' energy, summed over the readers."""
        total = 0.0
        rounded: dict[tuple[fx.Node, QuantizationSpec], Tensor] = {}
        for reader in self.migration.readers:
            values = self.samples[reader.operand]
            shape = [1] * values.ndim
            shape[reader.axis if values.ndim == reader.operand.meta["val"].ndim else -1] = -1
            wide = reader.by_column(scale).reshape(shape)
            moved = values if shift is None else values - shift.reshape(shape)
            key = (reader.operand, reader.point.spec)
            if key not in rounded:
                rounded[key] = self._round(moved / wide, scale, shift, reader.point.spec) * wide
            wanted = self._exact(reader, moved, shift is not None)
            got = self._run(reader, rounded[key], self._weight(reader, scale))
            energy = self._energy(reader, wanted, shift is not None)
            total += _counted(reader, got - wanted) / max(energy, 1e-30)
        return total

    def _exact(self, reader: Reader, moved: Tensor, shifted: bool) -> Tensor:
        key = (reader.node, shifted)
        if key not in self.exact:
            self.exact[key] = self._run(reader, moved, reader.weight.tensor.detach())
        return self.exact[key]

    def _energy(self, reader: Reader, wanted: Tensor, shifted: bool) -> float:
        key = (reader.node, shifted)
        if key not in self.energies:
            self.energies[key] = sum_of_squares(wanted)
        return self.energies[key]

    def _round(
        self, values: Tensor, scale: Tensor, shift: Tensor | None, spec: QuantizationSpec
    ) -> Tensor:
        observer = observer_of(spec)
        ends = torch.stack([self.seen.fit_low, self.seen.fit_high])
        ends = (ends if shift is None else ends - shift) / scale
        state = observer.init(1)
        state = observer.update(state, ends.reshape(1, -1))
        step, offset = qparams(*observer.range(state, spec), spec)
        whole = has_whole_offsets(spec)
        return dequantize(quantize(values, step, offset, grid_of(spec), whole=whole), step, offset)

    def _weight(self, reader: Reader, scale: Tensor) -> Tensor:
        """The weight as it would be stored, scaled back."""
        exact = reader.weight.tensor.detach().float()
        annotation = quantization_annotation(reader.weight.nodes[0])
        if annotation is None:
            return exact
        factors = column_factors(reader.use, exact.shape, reader.by_column(scale))
        spec = annotation.spec.model_copy(
            update={"range_calculator_cls": "minmax", "qparam_calculator_cls": "default"}
        )
        blocks, _ = plan_blocks(exact.shape, annotation.output_axis, spec.granularity)
        return quantize_weight(exact * factors, spec, blocks).dense() / factors

    def _run(self, reader: Reader, values: Tensor, weight: Tensor) -> Tensor:
        node, use = reader.node, reader.use
        own = node.args[use.position]
        assert isinstance(own, fx.Node)
        given = {
            reader.operand: values.to(reader.weight.tensor.dtype),
            own: use.operand(weight.to(reader.weight.tensor.dtype)),
        }

        def value(used: fx.Node) -> Any:
            return given[used] if used in given else constant_value(self.gm, used)

        with torch.no_grad():
            result: Tensor = evaluate(self.gm, node, value)
            return result
