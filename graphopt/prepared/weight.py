"""WeightQuantizer: rounds a weight, at no cost where the weight does not change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graphopt.numerics.affine import grid_of, has_offset, has_whole_offsets, qparams
from graphopt.numerics.blocks import Blocks
from graphopt.prepared.origin import Origin
from graphopt.prepared.straight_through import learned_round, round_groups
from graphopt.schemes.quantize import QuantizedWeight, quantize_weight, weight_range
from graphopt.specs import QuantizationSpec

__all__ = ["WeightQuantizer"]

_HELD = "held_"  # in front of what a state dict has of a fit
_SEARCH_PERIOD = 100  # in training a searched range is renewed this often


class WeightQuantizer(nn.Module):
    """Stands between a weight and its op.

    Attributes:
        origin: What it serves.
        spec: What the weight becomes.
        blocks: Which elements share a scale.
        observing: Whether the range follows the weight.
        rounding: Whether the weight is rounded.
        scale: Shape `blocks.counts`, float32; a parameter where it is learned.
        offset: The same shape.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, spec: QuantizationSpec, blocks: Blocks, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.origin = Origin()
        self.blocks = blocks
        self.dtype = dtype
        self.grid = grid_of(spec)
        self.learned = spec.fake_quantize_cls == "lsq" and not self.grid.is_float
        self._whole = has_whole_offsets(spec)
        self.observing = True
        self.rounding = True
        self._age = 0
        self._cache: tuple[tuple[int, int], Tensor] | None = None
        self._held: tuple[tuple[float, float], QuantizedWeight] | None = None
        self._has_trained = False
        if self.learned:
            self.scale = nn.Parameter(torch.ones(blocks.counts))
        else:
            self.register_buffer("scale", torch.ones(blocks.counts))
        self.register_buffer("offset", torch.zeros(blocks.counts))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cache": None}

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as the compressed program will compute it."""
        if not self.rounding:
            return weight
        trains = weight.requires_grad or self.learned
        if torch.compiler.is_compiling():
            if self._held is not None and not self.training:
                return self._held[1].dense()
            return self._differentiable(weight, renew=False)
        if torch.is_grad_enabled() and trains and self.training:
            return self._differentiable(weight, renew=True)
        return self._cached(weight)

    def _cached(self, weight: Tensor) -> Tensor:
        if weight.is_inference():
            return self.quantized(weight).dense()
        key = (weight.data_ptr(), weight._version)
        if self._cache is None or self._cache[0] != key:
            self._cache = (key, self.quantized(weight).dense())
        return self._cache[1]

    def train(self, mode: bool = True) -> WeightQuantizer:
        """Switch the mode; what was computed before is forgotten, in training for good."""
        self._cache = None
        if mode:
            self._held, self._has_trained = None, True
        return super().train(mode)

    def forget(self) -> None:
        """Round anew at the next call."""
        self._cache = None

    @property
    def is_fitted(self) -> bool:
        """Whether a fit or a training has found what it gives."""
        return self._held is not None or self._has_trained

    def hold(self, stored: QuantizedWeight, weight: Tensor) -> None:
        """Give this form of this weight, until the weight changes or trains; state dicts keep it."""
        self._held = (_key(weight), stored)
        self.forget()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._held is None:
            return
        key, stored = self._held
        figures = torch.tensor([*key, stored.sse, stored.energy], dtype=torch.float64)
        held = {"data": stored.data, "scale": stored.scale, "offset": stored.offset}
        for name, value in {**held, "figures": figures}.items():
            if value is not None:
                destination[f"{prefix}{_HELD}{name}"] = value

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *given: Any, **options: Any
    ) -> None:
        start = f"{prefix}{_HELD}"
        names = [name for name in state_dict if name.startswith(start)]
        held = {name.removeprefix(start): state_dict.pop(name) for name in names}
        super()._load_from_state_dict(state_dict, prefix, *given, **options)
        self.forget()
        if not {"data", "scale", "figures"} <= held.keys():
            self._held = None
            return
        total, squares, sse, energy = map(float, held["figures"])
        offset = held.get("offset")
        stored = QuantizedWeight(
            held["data"].clone(),
            held["scale"].clone(),
            None if offset is None else offset.clone(),
            self.grid.storage,
            self.blocks,
            self.dtype,
            sse,
            energy,
        )
        self._held = ((total, squares), stored)

    def start(self, weight: Tensor) -> None:
        """Take the scale from a weight."""
        self._renew(weight.detach())
        self.forget()

    def _renew(self, weight: Tensor) -> None:
        low, high = weight_range(weight, self.spec, self.blocks)
        scale, offset = qparams(low, high, self.spec, self._precision())
        self.scale.data = scale
        self.offset = torch.zeros_like(scale) if offset is None else offset

    def _precision(self) -> torch.dtype:
        kept = self.spec.scale_dtype or self.dtype
        return kept if kept in (torch.float16, torch.bfloat16) else torch.float32

    def _differentiable(self, weight: Tensor, *, renew: bool) -> Tensor:
        self._cache = None
        searched = "mse" in (self.spec.range_calculator_cls, self.spec.calculator)
        due = not searched or self._age % _SEARCH_PERIOD == 0
        if renew and self.observing and due and not self.learned:
            with torch.no_grad():
                self._renew(weight.detach())
        self._age += renew
        parts = self.blocks.split(weight)
        scale, offset = self.scale.reshape(-1), self._offset()
        offset = None if offset is None else offset.reshape(-1)
        if self.learned:
            return self.blocks.join(
                learned_round(parts, scale, offset, self.grid, whole=self._whole)
            )
        return self.blocks.join(round_groups(parts, scale, offset, self.grid, whole=self._whole))

    def _offset(self) -> Tensor | None:
        return self.offset if has_offset(self.spec) else None

    def quantized(self, weight: Tensor) -> QuantizedWeight:
        """The stored form: from the weight's own range, or from scales that training has fixed.

        Raises:
            CompressionError: The weight contains NaN or Inf.
        """
        if self._held is not None and self._held[0] == _key(weight):
            return self._held[1]
        if self.observing and not self.learned:
            return quantize_weight(weight, self.spec, self.blocks)
        scale = self.scale.detach().abs().clamp(min=torch.finfo(torch.float32).tiny)
        offset = self._offset()
        if offset is not None and not bool(offset.any()):
            offset = None
        return quantize_weight(weight, self.spec, self.blocks, fixed=(scale, offset))


def _key(weight: Tensor) -> tuple[float, float]:
    """What tells a weight from what becomes of it in training."""
    wide = weight.detach().double()
    return float(wide.sum()), float(wide.square().sum())
