"""Which form of tables a tensor carries: the length of entries, their axis, and the number of tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from graphopt.specs import PalettizationSpec, PerGroupedChannelGranularity, PerTensorGranularity
from graphopt.specs.dtypes import bits_of
from graphopt.specs.palettization import Bits

__all__ = ["NO_VECTORS", "Held", "chosen_form"]

NO_VECTORS = "scalar tables: the target has none of vectors"
_SCALAR_SHARE = 2e-2  # scalars gain more from groups than vectors, whose tables cost more
_FLOAT_BITS = 32


@dataclass(frozen=True)
class Held:
    """Which tables a target has.

    Attributes:
        vectors: Those with entries of more than one value.
        groups: Several of one tensor.
    """

    vectors: bool = True
    groups: bool = True


def chosen_form(
    spec: PalettizationSpec, shape: Sequence[int], output_axis: int, held: Held | None = None
) -> PalettizationSpec:
    """A spec whose `max_table_share` has decided for one tensor; another one as it is.

    Args:
        spec: What is asked for.
        shape: Shape of the stored weight.
        output_axis: Its output-channel axis.
        held: Which tables the target has; None is all.

    Examples:
        >>> from graphopt.palettization import KMeansPalettizerConfig
        >>> config = KMeansPalettizerConfig.presets.w2_vectors()
        >>> spec = config.global_config.op_state_spec["weight"]
        >>> made = chosen_form(spec, (30522, 384), 0)
        >>> made.n_bits, made.cluster_dim, made.cluster_axis
        (8, 4, 1)
        >>> chosen_form(spec, (64, 64), 0).n_bits
        4
    """
    limit = spec.max_table_share
    if limit is None:
        return spec
    held = Held() if held is None else held
    plain = spec.model_copy(update={"max_table_share": None})
    for n_bits, length in _lengths(spec):
        codes = math.prod(shape) * n_bits / length
        slot = _FLOAT_BITS if spec.lut_qspec is None else bits_of(spec.lut_qspec.dtype)
        table = 2**n_bits * length * slot
        if length > 1 and (not held.vectors or table > limit * codes):
            continue
        for axis in _axes(shape, output_axis, spec.cluster_axis):
            if shape[axis] % length:
                continue
            along = None if axis == output_axis or length == 1 else axis
            form = plain.model_copy(
                update={"n_bits": n_bits, "cluster_dim": length, "cluster_axis": along}
            )
            if not isinstance(spec.granularity, PerTensorGranularity):
                return form
            share = max(spec.grouped_table_share, _SCALAR_SHARE if length == 1 else 0.0)
            unit = length if along is None else 1
            count = _tables(shape[output_axis], unit, share * codes / table)
            if count == 1 or not held.groups:
                return form
            groups = PerGroupedChannelGranularity(
                axis=output_axis, group_size=shape[output_axis] // count
            )
            return form.model_copy(update={"granularity": groups})
    return plain  # the layout says what is wrong


def _lengths(spec: PalettizationSpec) -> Iterator[tuple[int, int]]:
    """Bits of a code and length of an entry at the rate of the spec, halved again and again."""
    length = spec.cluster_dim
    while True:
        n_bits, rest = divmod(spec.n_bits * length, spec.cluster_dim)
        if rest == 0 and n_bits in get_args(Bits):
            yield n_bits, length
        if length % 2:
            return
        length //= 2


def _axes(shape: Sequence[int], output_axis: int, asked: int | None) -> list[int]:
    """Axes to try: the one that is asked for, else the output channels, then the longest."""
    if asked is not None:
        return [asked]
    others = [axis for axis in range(len(shape)) if axis != output_axis]
    return [output_axis, *sorted(others, key=lambda axis: -shape[axis])]


def _tables(channels: int, unit: int, most: float) -> int:
    """The largest number of groups of whole units of channels, at most so many; 1 always."""
    fitting = (
        count
        for count in range(min(int(most), channels), 0, -1)
        if channels % count == 0 and (channels // count) % unit == 0
    )
    return next(fitting, 1)
