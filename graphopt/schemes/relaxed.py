"""Weights between two neighbouring levels, which training pushes to one of them.

AdaRound's relaxation (Nagel et al., arXiv 2004.10568, equations 23 to 25): a weight is
`low + h(V)·(high − low)` with `h(V) = clip(1.2·σ(V) − 0.1, 0, 1)`. For integers the levels are the two
around the value; for palettes they are neighbouring entries of its table, so that what is learned is
an index.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from graphopt.numerics.affine import dequantize, grid_of
from graphopt.numerics.packing import pack, unpack
from graphopt.schemes.base import StoredWeight
from graphopt.schemes.integers import QuantizedWeight, scale_precision, store_weight
from graphopt.schemes.palette import PalettizedWeight
from graphopt.specs import QuantizationSpec

__all__ = ["RelaxedInteger", "RelaxedPalette", "RelaxedWeight"]

_STRETCH, _SHIFT = 1.2, 0.1
_HARD = 1e-3  # h this near to 0 or 1 counts as decided
_EDGE = 0.02  # the farthest that a start is decided
_LEAN = 0.5  # how far a start leans from the weight's own place to the element that was chosen


class RelaxedWeight(nn.Module, ABC):
    """A weight whose elements lie between two levels.

    Attributes:
        v: V of each element.
        scales: What trains besides, relative to the stored values: one per scale or table entry.
        frozen: Whether elements are decided.
    """

    def __init__(self, place: Tensor, chosen: Tensor, scales: Tensor) -> None:
        """Begin between a weight's own place and the level that it has.

        Args:
            place: Where the weight lies between its levels, 0 to 1.
            chosen: The level that it has, 0 or 1.
            scales: Scales or table entries.
        """
        super().__init__()
        h = (place + _LEAN * (chosen - place)).clamp(_EDGE, 1 - _EDGE)
        self.begun = chosen
        inner = (h + _SHIFT) / _STRETCH
        self.v = nn.Parameter((inner / (1 - inner)).log())
        self.scales = nn.Parameter(torch.zeros_like(scales))
        self.frozen = False

    def h(self) -> Tensor:
        """Share of the higher level, of the weight's shape; 0 or 1 once frozen."""
        h = (_STRETCH * self.v.sigmoid() - _SHIFT).clamp(0, 1)
        return (h.detach() >= 0.5).to(h.dtype) if self.frozen else h

    def moved(self) -> int:
        """Elements whose nearer level is not the one that they had."""
        return int(((self.h().detach() >= 0.5) != (self.begun >= 0.5)).sum())

    def undecided(self) -> int:
        """Elements that are not at one of their levels."""
        h = self.h().detach()
        return int(((h > _HARD) & (h < 1 - _HARD)).sum())

    def regulariser(self, beta: float) -> Tensor:
        """Mean of `1 − |2h − 1|^β`."""
        return (1 - (2 * self.h() - 1).abs().pow(beta)).mean()

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight as it is now, float32."""

    @abstractmethod
    def stored(self) -> StoredWeight:
        """The stored form, every element at the nearer of its levels."""


class RelaxedInteger(RelaxedWeight):
    """Integers with scales."""

    def __init__(self, form: QuantizedWeight, spec: QuantizationSpec, target: Tensor) -> None:
        grid = grid_of(spec)
        elements = form.elements().to(torch.float32)
        scale = form.scale.float()
        wide = form.blocks.spread(scale)
        offset = None if form.offset is None else form.offset.float()
        wanted = target.float() / wide
        wanted = wanted if offset is None else wanted + form.blocks.spread(offset)
        low = torch.where(wanted > elements, elements, elements - 1)
        low = low.clamp(grid.q_min, grid.q_max - 1)
        place = (wanted - low).clamp(0, 1)
        super().__init__(place, elements - low, scale)
        self.form, self.spec, self.target = form, spec, target
        self.low, self.scale, self.offset = low, scale, offset

    def dense(self) -> Tensor:
        """`scale · (low + h − offset)`."""
        scale = self.form.blocks.spread(self.scale * self.scales.exp())
        offset = None if self.offset is None else self.form.blocks.spread(self.offset)
        return dequantize(self.low + self.h(), scale, offset)

    def stored(self) -> QuantizedWeight:
        """See `RelaxedWeight.stored`."""
        elements = self.low + (self.h().detach() >= 0.5)
        scale = self.scale * self.scales.detach().exp()
        scale = scale.to(scale_precision(self.target, self.spec)).float()
        return store_weight(self.target, elements, scale, self.offset, self.spec, self.form.blocks)


class RelaxedPalette(RelaxedWeight):
    """Entries of tables, one value each."""

    def __init__(self, form: PalettizedWeight, target: Tensor) -> None:
        layout = form.layout
        codes = unpack(form.indices, form.n_bits, target.numel()).reshape(layout.shape)
        codes = layout.split(codes)[..., 0].long()
        tables = form.table_values().reshape(layout.n_groups, -1).float()
        order = tables.argsort(1)
        tables = tables.gather(1, order)
        codes = order.argsort(1).gather(1, codes)
        wanted = layout.split(_bare(form, target))[..., 0]
        chosen = tables.gather(1, codes)
        low = torch.where(wanted > chosen, codes, codes - 1).clamp(0, tables.shape[1] - 2)
        bottom, top = tables.gather(1, low), tables.gather(1, low + 1)
        place = ((wanted - bottom) / (top - bottom).clamp_min(1e-30)).clamp(0, 1)
        super().__init__(place, (codes - low).float(), tables)
        self.form, self.target, self.tables, self.low, self.order = form, target, tables, low, order
        gaps = tables.diff(dim=1)
        self.unit = float(gaps[gaps > 0].median()) if bool((gaps > 0).any()) else 0.0

    def entries(self) -> Tensor:
        """Tables as they are now, [groups, entries]."""
        if self.form.lut_storage is not None:
            return self.tables
        return self.tables + self.unit * self.scales

    def dense(self) -> Tensor:
        """`low + h · (high − low)` of the entries."""
        tables = self.entries()
        bottom, top = tables.gather(1, self.low), tables.gather(1, self.low + 1)
        joined = self.form.layout.join((bottom + self.h() * (top - bottom))[..., None])
        scale = self.form.channel_scale
        return joined if scale is None else joined * scale.float()

    def stored(self) -> PalettizedWeight:
        """See `RelaxedWeight.stored`."""
        form, layout = self.form, self.form.layout
        codes = self.low + (self.h().detach() >= 0.5)
        lut = form.lut
        if form.lut_storage is None:
            lut = self.entries().detach().to(form.lut.dtype).reshape(form.lut.shape)
        else:
            codes = self.order.gather(1, codes)
        indices = pack(layout.join_indices(codes.to(torch.uint8)).contiguous(), form.n_bits)
        return replace(form, indices=indices, lut=lut)


def _bare(form: PalettizedWeight, target: Tensor) -> Tensor:
    """The weight that tables stand for, without its channels' scales."""
    wide = target.float()
    return wide if form.channel_scale is None else wide / form.channel_scale.float()
