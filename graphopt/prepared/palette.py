"""WeightPalettizer: a weight that trains while it computes as its palette does."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.numerics.device import lacks
from graphopt.numerics.soft_palette import soft_palette
from graphopt.prepared.origin import Origin
from graphopt.schemes.palettize import Arranged, PalettizedWeight, arrange, assemble
from graphopt.schemes.tables import StoredTables, nearest_codes, round_tables
from graphopt.specs import DKMTrainingSpec, PalettizationSpec

__all__ = ["WeightPalettizer"]

_log = logging.getLogger(__name__)


class WeightPalettizer(nn.Module):
    """Stands between a trained weight and its op.

    In evaluation the weight takes its nearest table entries. In training it is a soft mixture of
    them (DKM), or takes the nearest ones and lets gradients pass (straight-through), while the
    tables follow the weight. Once frozen, codes stay and entries are the means of their weights,
    so that training goes on through the tables alone.

    Attributes:
        origin: What it serves.
        spec: What the weight becomes.
        strategy: How it trains: DKM, or None for the straight-through estimator.
        palettizing: Whether it does anything.
        frozen: Whether codes stay.
        device: Where soft mixtures are computed; None is where the weight is.
        tables: [groups, k, cluster_dim].
        temperature: τ of each group, [groups], in squared units of the weight.
    """

    tables: Tensor
    temperature: Tensor

    def __init__(
        self,
        weight: Tensor,
        start: PalettizedWeight,
        spec: PalettizationSpec,
        output_axis: int,
        strategy: DKMTrainingSpec | None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.origin = Origin()
        self.output_axis = output_axis
        self.strategy = strategy
        self.palettizing = True
        self.frozen = False
        self.device: torch.device | None = None
        self._cache: tuple[tuple[int, int], Tensor] | None = None
        self._codes: Tensor | None = None
        shape = (start.layout.n_groups, spec.n_entries, spec.cluster_dim)
        self.register_buffer("tables", start.table_values().reshape(shape).clone())
        parts = self._arranged(weight.detach())
        nearest = _taken(self.tables, nearest_codes(parts.vectors, self.tables, None))
        error = (parts.vectors - nearest).float().square().sum(2).mean(1)
        spread = parts.vectors.float().square().sum(2).mean(1)
        scale = 1.0 if strategy is None else strategy.temperature
        floor = (1e-6 * spread).clamp_min(torch.finfo(torch.float32).tiny)
        self.register_buffer("temperature", scale * torch.maximum(error, floor))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cache": None}

    def _arranged(self, weight: Tensor) -> Arranged:
        return arrange(weight, self.spec, self.output_axis, None)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as the compressed program will compute it, or as training approximates it."""
        if not self.palettizing:
            return weight
        if torch.compiler.is_compiling() or not (self.training and torch.is_grad_enabled()):
            return self._hard(weight)
        self._cache = None
        parts = self._arranged(weight)
        if self.frozen:
            values = self._frozen(parts)
        elif self.strategy is not None:
            values = self._soft(parts)
        else:
            values = self._straight_through(parts)
        dense = parts.layout.join(values)
        if parts.channel_scale is not None:
            dense = dense * parts.channel_scale.detach()
        return dense.to(weight.dtype)

    def train(self, mode: bool = True) -> WeightPalettizer:
        """Switch the mode; what was computed before is forgotten."""
        self._cache = None
        return super().train(mode)

    def _soft(self, parts: Arranged) -> Tensor:
        assert self.strategy is not None
        own = parts.vectors.float(), self.tables.float(), self.temperature
        if self.device is not None:
            try:
                vectors, tables, temperature = (tensor.to(self.device) for tensor in own)
                steps = self.strategy.iterations
                mixed, tables = soft_palette(vectors, tables, temperature, steps)
                self._keep(tables.to(self.tables.device))
                return mixed.to(parts.vectors.device)
            except (NotImplementedError, TypeError) as error:
                if not lacks(self.device, error):
                    raise
                why = "%s: %s has no kernel for its soft palette (%s); trained where the weight is"
                _log.warning(why, self.origin.name, self.device, error)
                self.device = None
        mixed, tables = soft_palette(*own, self.strategy.iterations)
        self._keep(tables)
        return mixed

    def _straight_through(self, parts: Arranged) -> Tensor:
        vectors = parts.vectors
        with torch.no_grad():
            codes = nearest_codes(vectors, self.tables, None)
            self._keep(_means(vectors.float(), codes, self.tables.float()))
            stored = self._stored()
            nearest = _taken(stored, nearest_codes(vectors, stored, None))
        return vectors + (nearest - vectors).detach()

    def _frozen(self, parts: Arranged) -> Tensor:
        if self._codes is None:
            self._codes = nearest_codes(parts.vectors.detach(), self.tables, None)
        means = _means(parts.vectors, self._codes, self.tables)
        self._keep(means.detach())
        stored = means + (self._stored() - means).detach()
        return _taken(stored, self._codes)

    def _keep(self, tables: Tensor) -> None:
        """Take over tables; scalar ones stay increasing as long as codes may change."""
        kept = tables.detach().to(self.tables.dtype)
        if self.spec.cluster_dim == 1 and not self.frozen:
            kept = kept.sort(dim=1).values
        # not in place: the backward pass still needs the old ones
        self.tables = kept

    def _stored(self) -> Tensor:
        """Entries as they will be stored."""
        tables = self.tables
        return (
            tables
            if self.spec.lut_qspec is None
            else round_tables(tables, self.spec.lut_qspec).decoded
        )

    def _hard(self, weight: Tensor) -> Tensor:
        if weight.is_inference() or torch.compiler.is_compiling():
            return self.palettized(weight).dense()
        key = (weight.data_ptr(), weight._version)
        if self._cache is None or self._cache[0] != key:
            self._cache = (key, self.palettized(weight).dense())
        return self._cache[1]

    @torch.no_grad()
    def palettized(self, weight: Tensor) -> PalettizedWeight:
        """The stored form."""
        source = weight.detach()
        parts = self._arranged(source)
        tables = self.tables.to(source.dtype)
        codes = self._codes if self.frozen else None
        stored: Tensor | StoredTables = tables
        decoded = tables
        if self.spec.lut_qspec is not None:
            stored = round_tables(tables, self.spec.lut_qspec)
            decoded = stored.decoded
        if codes is None:
            codes = nearest_codes(parts.vectors, decoded, None)
        return assemble(source, self.spec, parts, stored, codes)


def _taken(tables: Tensor, codes: Tensor) -> Tensor:
    """Entries by code, [groups, n, length]."""
    groups, k, length = tables.shape
    rows = codes.int() + k * torch.arange(groups, dtype=torch.int32, device=codes.device)[:, None]
    taken = tables.reshape(-1, length).index_select(0, rows.reshape(-1))
    return taken.reshape(groups, -1, length)


def _means(vectors: Tensor, codes: Tensor, tables: Tensor) -> Tensor:
    """Mean of the vectors of each code; an unused entry stays."""
    groups, k, length = tables.shape
    rows = codes.int() + k * torch.arange(groups, dtype=torch.int32, device=codes.device)[:, None]
    rows = rows.reshape(-1)
    total = torch.zeros(groups * k, length, dtype=vectors.dtype, device=vectors.device)
    total = total.index_add(0, rows, vectors.reshape(-1, length))
    count = torch.bincount(rows, minlength=groups * k).to(vectors.dtype)[:, None]
    means = torch.where(count > 0, total / count.clamp_min(1), tables.reshape(-1, length))
    return means.reshape(groups, k, length)
