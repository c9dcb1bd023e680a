"""Pruning: a weight as its values that are not zero and a mask of where they stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt.errors import CompressionError
from graphopt.ir.editor import Editor
from graphopt.ir.ops import sparse_to_dense
from graphopt.numerics.finite import all_finite
from graphopt.numerics.packing import pack
from graphopt.numerics.sparsity import block_mask, channel_mask, n_m_mask, unstructured_mask
from graphopt.schemes.base import Scheme, Statistics, StoredWeight
from graphopt.schemes.sizes import Parts, mask_bits, tensor_bits
from graphopt.specs import PruningSpec
from graphopt.specs.dtypes import bits_of
from graphopt.specs.pruning import BlockStructured, ChannelStructured, NMStructured
from graphopt.specs.storage import StorageRules

__all__ = ["PrunedWeight", "Pruning", "mask_of", "prune", "unfit", "zeros"]


@dataclass(frozen=True)
class PrunedWeight(StoredWeight):
    """The stored form of a pruned weight.

    Attributes:
        values: Elements that stay, in the order of the weight, [values].
        mask: One bit per element, packed, uint8.
        shape: Shape of the weight.
        sse: Squared error, the sum of the squares that became zero.
        energy: Sum of the weight's squares.
    """

    values: Tensor
    mask: Tensor
    shape: tuple[int, ...]
    sse: float
    energy: float

    kind: ClassVar[str] = "sparse"

    def dense(self) -> Tensor:
        """The weight with its zeros."""
        return sparse_to_dense(self.values, self.mask, self.shape)

    def parts(self) -> Parts:
        """Values and mask."""
        return Parts(math.prod(self.shape), None, tensor_bits(self.values, self.mask))

    def described(self, spec: PruningSpec) -> dict[str, Any]:
        """See `StoredWeight.described`."""
        del spec
        return {"status": "pruned", "detail": zeros(self.values.numel(), math.prod(self.shape))}

    def emit(
        self, edit: Editor, name: str, like: fx.Node, *, before: fx.Node | None = None
    ) -> fx.Node:
        """Emit the op that scatters the values.

        Args: as for `StoredWeight.emit`.
        """
        values = edit.constant(f"{name}_values", self.values, like=like, before=before)
        mask = edit.constant(f"{name}_mask", self.mask, like=like, before=before)
        op = torch.ops.graphopt.sparse_to_dense.default
        return edit.call(op, values, mask, list(self.shape), like=like, before=before)


def zeros(kept: int, elements: int) -> str:
    """The share of zeros, for people."""
    return f"{100 * (1 - kept / max(elements, 1)):.1f} % zeros"


def unfit(shape: tuple[int, ...], spec: PruningSpec) -> str:
    """Why a weight of this shape cannot have the scheme, or ""."""
    scheme = spec.pruning_scheme
    axis = getattr(scheme, "axis", None)
    if axis is None:
        return ""
    if not -len(shape) <= axis < len(shape):
        return f"pruning_scheme.axis={axis}, but the weight has shape {shape}"
    unit = 1
    if isinstance(scheme, BlockStructured):
        unit = scheme.block_size
    elif isinstance(scheme, NMStructured):
        unit = scheme.m
    if shape[axis] % unit:
        return f"blocks of {unit} do not divide the {shape[axis]} elements of axis {axis}"
    return ""


def mask_of(weight: Tensor, spec: PruningSpec, sparsity: float | None = None) -> Tensor:
    """Where elements stay, bool of the weight's shape.

    Args:
        weight: Floating point, any shape.
        spec: What is asked for.
        sparsity: Share of zeros now, for schedules; None is the spec's own. n:m keeps all until
            its schedule has begun.

    Raises:
        CompressionError: The weight holds NaN or Inf, or a class of the user's returns another shape.
    """
    if not all_finite(weight):
        raise CompressionError("contains NaN or Inf")
    share = spec.final_sparsity if sparsity is None else sparsity
    scheme = spec.pruning_scheme
    if isinstance(spec.pruning_algo, type):
        kept = spec.pruning_algo.compute_mask(weight, share, scheme)  # type: ignore[attr-defined]
        if not isinstance(kept, Tensor) or kept.shape != weight.shape:
            raise CompressionError(
                f"{spec.pruning_algo.__name__} gave no mask of the weight's shape"
            )
        return kept != 0
    if isinstance(scheme, NMStructured):
        return n_m_mask(weight, scheme.n if share > 0 else 0, scheme.m, scheme.axis)
    if isinstance(scheme, BlockStructured):
        return block_mask(weight, share, scheme.axis, scheme.block_size)
    if isinstance(scheme, ChannelStructured):
        return channel_mask(weight, share, scheme.axis)
    return unstructured_mask(weight, share)


def prune(weight: Tensor, mask: Tensor) -> PrunedWeight:
    """The stored form of a weight of which the elements in `mask` stay."""
    dropped = weight.detach().masked_fill(mask, 0).to(torch.float64)
    return PrunedWeight(
        values=weight.detach()[mask].clone(),
        mask=pack(mask.to(torch.uint8), 1),
        shape=tuple(weight.shape),
        sse=float(dropped.square().sum()),
        energy=float(weight.detach().to(torch.float64).square().sum()),
    )


class Pruning(Scheme[PruningSpec, PrunedWeight]):
    """Weights as a mask and the values that are not zero."""

    kind: ClassVar[str] = "prune"
    spec_type = PruningSpec
    stored_type = PrunedWeight

    def make(self, weight: Tensor, spec: PruningSpec, known: Statistics) -> PrunedWeight:
        """Keep what `mask_of` keeps."""
        del known
        return prune(weight, mask_of(weight, spec))

    def parts(
        self, spec: PruningSpec, shape: Sequence[int], output_axis: int, rules: StorageRules
    ) -> Parts:
        """See `Scheme.parts`; the share of zeros is taken as exact."""
        del output_axis
        reason = unfit(tuple(shape), spec)
        if reason:
            raise CompressionError(reason)
        elements = math.prod(shape)
        kept = elements - round(spec.final_sparsity * elements)
        return Parts(elements, None, kept * bits_of(rules.float_dtype) + mask_bits(shape))

    def name_of(self, spec: PruningSpec) -> str:
        """Such as "50.0 % zeros"."""
        return f"{spec.final_sparsity:.1%} zeros"
