"""Palettization: a weight becomes packed indices and tables, by k-means on its values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphopt.config.palettization import KMeansPalettizerConfig, ModuleKMeansPalettizerConfig
from graphopt.errors import CompressionError
from graphopt.numerics.affine import has_offset
from graphopt.numerics.device import for_doubles
from graphopt.numerics.finite import all_finite
from graphopt.numerics.kmeans1d import cluster_1d, sum_of_squares
from graphopt.numerics.kmeans_nd import VectorSearch, cluster_vectors
from graphopt.numerics.packing import pack
from graphopt.schemes.base import Scheme, Statistics
from graphopt.schemes.forms import chosen_form
from graphopt.schemes.layout import Layout, plan_layout
from graphopt.schemes.palette import PalettizedWeight
from graphopt.schemes.relaxed import RelaxedPalette
from graphopt.schemes.sizes import Parts, mask_bits
from graphopt.schemes.tables import StoredTables, nearest_codes, quantize_tables
from graphopt.specs import PalettizationSpec, PerGroupedChannelGranularity
from graphopt.specs.dtypes import bits_of, dtype_name
from graphopt.specs.storage import Codes, StorageRules

__all__ = [
    "Arranged",
    "Palettization",
    "PalettizedWeight",
    "arrange",
    "assemble",
    "palettize",
]

# field of `VectorKMeansConfig` → of `VectorSearch`
_VECTOR_OPTIONS = {
    "n_local_trials": "trials",
    "n_init": "starts",
    "max_iter": "max_steps",
    "tol": "tolerance",
}


def palettize(
    weight: Tensor,
    spec: PalettizationSpec,
    *,
    output_axis: int = 0,
    importance: Tensor | None = None,
    seed: int = 0,
) -> PalettizedWeight:
    """Cluster one weight.

    Args:
        weight: Floating point, any rank from 1, any device.
        spec: What it becomes.
        output_axis: Output-channel axis of the stored tensor.
        importance: Weight of each element's squared error, same shape; None weighs all alike.
        seed: Seed of the initial centroids of vector tables.

    Returns:
        Indices, tables and scales, on the device of `weight`.

    Raises:
        CompressionError: NaN or Inf in the weight, or a layout that cannot be built.
    """
    spec = chosen_form(spec, weight.shape, output_axis)
    if spec.outlier_fraction:
        return _palettize_around_outliers(weight.detach(), spec, output_axis, importance, seed)
    parts = arrange(weight.detach(), spec, output_axis, importance)
    tables, codes, sse = _cluster(parts, spec, seed)
    stored = None
    if spec.lut_qspec is not None:
        stored = quantize_tables(parts.vectors, parts.weights, tables, spec.lut_qspec)
        codes = nearest_codes(parts.vectors, stored.decoded, parts.weights)
    plain = parts.channel_scale is None and parts.weights is None and stored is None
    return assemble(weight, spec, parts, stored or tables, codes, sse if plain else None)


def _palettize_around_outliers(
    weight: Tensor, spec: PalettizationSpec, output_axis: int, importance: Tensor | None, seed: int
) -> PalettizedWeight:
    """Cluster what is no outlier, and keep the outliers' differences to their table entries."""
    plain = spec.model_copy(update={"outlier_fraction": 0.0})
    count = round(spec.outlier_fraction * weight.numel())
    if count == 0:
        return palettize(weight, plain, output_axis=output_axis, importance=importance, seed=seed)
    if not all_finite(weight):
        # they would be taken for outliers and kept
        raise CompressionError("values contain NaN or Inf")
    layout = plan_layout(weight.shape, output_axis, spec)
    grouped = layout.split(weight.float())
    distance = layout.join((grouped - grouped.mean(1, keepdim=True)).square())
    if importance is not None:
        distance = distance * importance
    places = distance.reshape(-1).topk(count).indices
    kept = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    kept[places] = False
    kept = kept.reshape(weight.shape)
    counted = kept.float() if importance is None else importance * kept
    stored = palettize(
        weight.masked_fill(~kept, 0), plain, output_axis=output_axis, importance=counted, seed=seed
    )
    rest = (weight - stored.dense())[~kept]
    stored = replace(
        stored,
        outliers=rest.contiguous(),
        outlier_mask=pack((~kept).to(torch.uint8), 1),
        energy=sum_of_squares(weight),
    )
    return replace(stored, sse=float(_squared_error(weight, stored)))


@dataclass(frozen=True)
class Arranged:
    """A weight laid out for its tables.

    Attributes:
        layout: Which elements share a table.
        scaled: The weight, divided by its channel scales if there are any.
        channel_scale: Per-output-channel scale, rank K, or None.
        vectors: [groups, vectors per group, cluster_dim].
        weights: Importance of each vector, [groups, vectors per group], or None.
    """

    layout: Layout
    scaled: Tensor
    channel_scale: Tensor | None
    vectors: Tensor
    weights: Tensor | None


def arrange(
    weight: Tensor, spec: PalettizationSpec, output_axis: int, importance: Tensor | None
) -> Arranged:
    """Lay a weight out for its tables; arguments as for `palettize`. Gradients pass."""
    layout = plan_layout(weight.shape, output_axis, spec)
    scaled, mass, channel_scale = weight, importance, None
    if spec.enable_per_channel_scale:
        others = [axis for axis in range(weight.ndim) if axis != output_axis]
        largest = weight.detach().abs()
        largest = largest.amax(dim=others, keepdim=True) if others else largest
        channel_scale = torch.where(largest > 0, largest, torch.ones_like(largest))
        scaled = weight / channel_scale
        # errors count in the weight's own units
        wide = channel_scale.to(for_doubles(channel_scale.device)).double()
        relative = (wide / wide.max()).square().float().to(weight.device)
        mass = relative.expand_as(weight)
        mass = mass if importance is None else mass * importance
    weights = None if mass is None else layout.split(mass).mean(-1)
    return Arranged(layout, scaled, channel_scale, layout.split(scaled), weights)


def _cluster(
    parts: Arranged, spec: PalettizationSpec, seed: int
) -> tuple[Tensor, Tensor, float | None]:
    if parts.layout.cluster_dim > 1:
        chosen = spec.vector_kmeans
        given = {} if chosen is None else chosen.model_dump(exclude_none=True)
        options = {_VECTOR_OPTIONS[name]: value for name, value in given.items()}
        tables, codes, _ = cluster_vectors(
            parts.vectors,
            spec.n_entries,
            weights=parts.weights,
            seed=seed,
            search=VectorSearch(**options),
        )
        return tables, codes, None
    values = parts.vectors[..., 0]
    clustering = cluster_1d(values, [spec.n_entries], weights=parts.weights)[spec.n_entries]
    return clustering.tables[..., None], clustering.indices, float(clustering.sse.sum())


def assemble(
    weight: Tensor,
    spec: PalettizationSpec,
    parts: Arranged,
    tables: Tensor | StoredTables,
    codes: Tensor,
    sse: float | None = None,
) -> PalettizedWeight:
    """The stored form for given tables and codes.

    Args:
        weight: What they stand for.
        spec: What was asked for.
        parts: How it was laid out.
        tables: [groups, k, cluster_dim], or quantized ones.
        codes: [groups, vectors per group].
        sse: Squared error, where it is known.
    """
    layout = parts.layout
    shape = layout.lut_shape(spec.n_entries)
    scale_shape = [*shape[:-2], 1, 1]
    stored = tables if isinstance(tables, StoredTables) else None
    lut_scale = None if stored is None else stored.scale.reshape(scale_shape)
    lut_offset = None
    if stored is not None and stored.offset is not None:
        lut_offset = stored.offset.reshape(scale_shape)
    result = PalettizedWeight(
        indices=pack(layout.join_indices(codes).contiguous(), spec.n_bits),
        lut=tables.data if isinstance(tables, StoredTables) else tables.reshape(shape).contiguous(),
        lut_scale=lut_scale,
        lut_offset=lut_offset,
        lut_storage=None if stored is None else stored.storage,
        channel_scale=parts.channel_scale,
        layout=layout,
        n_bits=spec.n_bits,
        dtype=weight.dtype,
        sse=0.0,
        energy=sum_of_squares(weight.detach()),
    )
    if sse is None:
        sse = float(_squared_error(weight.detach(), result))
    return replace(result, sse=sse)


def _squared_error(weight: Tensor, palettized: PalettizedWeight) -> Tensor:
    error = weight.float() - palettized.dense().float()
    error = error.to(for_doubles(error.device))
    return torch.linalg.vector_norm(error, dtype=torch.float64).square()


_TEXT = re.compile(r"(\d)(?:-bit)?(?: ?g(\d+))?(?: ?v(\d+))?")


class Palettization(Scheme[PalettizationSpec, PalettizedWeight]):
    """Weights as indices into tables."""

    kind: ClassVar[str] = "palettize"
    spec_type = PalettizationSpec
    stored_type = PalettizedWeight
    searched: ClassVar[bool] = True
    part: ClassVar[str] = "palettization"

    def make(self, weight: Tensor, spec: PalettizationSpec, known: Statistics) -> PalettizedWeight:
        """See `palettize`."""
        return palettize(
            weight,
            spec,
            output_axis=known.output_axis,
            importance=known.importance,
            seed=known.seed,
        )

    def make_all(
        self, weight: Tensor, specs: Mapping[str, PalettizationSpec], known: Statistics
    ) -> dict[str, PalettizedWeight]:
        """See `Scheme.make_all`; specs that differ in bits alone share one clustering."""
        made: dict[str, PalettizedWeight] = {}
        families: dict[PalettizationSpec, list[str]] = {}
        for name, spec in specs.items():
            if spec.cluster_dim == 1 and not spec.lut_qspec and not spec.outlier_fraction:
                families.setdefault(spec.model_copy(update={"n_bits": 4}), []).append(name)
            else:
                made[name] = self.make(weight, spec, known)
        for family, names in families.items():
            parts = arrange(weight, family, known.output_axis, known.importance)
            sizes = [specs[name].n_entries for name in names]
            clusterings = cluster_1d(parts.vectors[..., 0], sizes, weights=parts.weights)
            for name in names:
                best = clusterings[specs[name].n_entries]
                made[name] = assemble(
                    weight, specs[name], parts, best.tables[..., None], best.indices
                )
        return made

    def parts(
        self,
        spec: PalettizationSpec,
        shape: Sequence[int],
        output_axis: int,
        rules: StorageRules,
    ) -> Parts:
        """See `Scheme.parts`."""
        spec = chosen_form(spec, shape, output_axis)
        layout = plan_layout(shape, output_axis, spec)
        floats, tables, elements = bits_of(rules.float_dtype), layout.n_groups, math.prod(shape)
        entry, sides = bits_of(rules.lut_dtype or rules.float_dtype), 0
        if spec.lut_qspec is not None:
            entry = bits_of(spec.lut_qspec.dtype)
            sides += tables * (floats + (8 if has_offset(spec.lut_qspec) else 0))
        if spec.enable_per_channel_scale:
            sides += layout.shape[output_axis] * floats
        outliers = round(spec.outlier_fraction * elements)
        if outliers:
            sides += outliers * floats + mask_bits(shape)
        count = math.prod(layout.index_shape())
        codes = Codes(count, spec.n_bits, tables=tables, slot_bits=spec.cluster_dim * entry)
        return Parts(elements, codes, sides)

    def name_of(self, spec: PalettizationSpec) -> str:
        """Such as "4-bit" or "4-bit g16"."""
        words, per = [f"{spec.n_bits}-bit"], spec.granularity
        if isinstance(per, PerGroupedChannelGranularity):
            words.append(f"g{per.group_size}" + (f" axis {per.axis}" if per.axis else ""))
        along = "" if spec.cluster_axis is None else f" axis {spec.cluster_axis}"
        words += [f"v{spec.cluster_dim}{along}"] if spec.cluster_dim > 1 else []
        words += [f"{dtype_name(spec.lut_qspec.dtype)} tables"] if spec.lut_qspec else []
        words += ["scaled"] if spec.enable_per_channel_scale else []
        words += [f"{spec.outlier_fraction:.2%} outliers"] if spec.outlier_fraction else []
        return " ".join(words)

    def config_of(self, specs: Mapping[str, PalettizationSpec]) -> KMeansPalettizerConfig:
        """See `Scheme.config_of`."""
        return KMeansPalettizerConfig(
            global_config=ModuleKMeansPalettizerConfig(
                op_state_spec=None, module_state_spec=dict(specs)
            )
        )

    def parse(self, text: str) -> tuple[PalettizationSpec, None] | None:
        """Read "4", "4-bit", "4 g16" (a table per 16 channels) or "8 v4" (entries of 4)."""
        match = _TEXT.fullmatch(text)
        if match is None:
            return None
        bits, group, length = match.groups()
        options: dict[str, Any] = {"n_bits": int(bits), "cluster_dim": int(length or 1)}
        if group:
            options["granularity"] = PerGroupedChannelGranularity(group_size=int(group))
        return PalettizationSpec(**options), None

    def with_algorithm(self, spec: PalettizationSpec, algorithm: str) -> PalettizationSpec:
        """The spec with tables found by another algorithm (`PalettizationSpec.algorithm`)."""
        return PalettizationSpec.model_validate({**dict(spec), "algorithm": algorithm})

    def relax(
        self, stored: PalettizedWeight, spec: PalettizationSpec, target: Tensor
    ) -> RelaxedPalette | None:
        """See `Scheme.relax`; entries of one value have neighbours."""
        del spec
        if stored.layout.cluster_dim > 1 or stored.outliers is not None or stored.n_bits < 1:
            return None
        return RelaxedPalette(stored, target)
