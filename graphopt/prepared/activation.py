"""ActivationQuantizer: observes an activation and rounds it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graphopt.numerics.affine import QParams, grid_of, has_offset, has_whole_offsets, qparams
from graphopt.numerics.blocks import Blocks
from graphopt.observers import observer_of
from graphopt.prepared.origin import Origin
from graphopt.prepared.straight_through import learned_round, round_groups, round_tensor
from graphopt.specs import PerChannelGranularity, QuantizationSpec
from graphopt.specs.granularity import value_block_sizes

__all__ = ["ActivationQuantizer"]

_COSTLY_PERIOD = 64  # in training a searched range is renewed this often


class ActivationQuantizer(nn.Module):
    """Stands where an activation is quantized; several places with one scale share one.

    Attributes:
        origin: What it serves.
        spec: What the activation becomes.
        observing: Whether tensors that pass enter the statistics.
        rounding: Whether they are rounded; without a range they pass as they are.
        scale: [groups] float32; a parameter where it is learned.
        offset: [groups] float32.
        seen: Tensors that entered the statistics.
        known: Whether it can round; scales that are computed from each tensor always are.
    """

    scale: Tensor
    offset: Tensor
    seen: Tensor
    known: Tensor

    def __init__(self, spec: QuantizationSpec, groups: int = 1) -> None:
        super().__init__()
        self.spec = spec
        self.origin = Origin()
        self.groups = groups
        self.grid = grid_of(spec)
        self.learned = spec.fake_quantize_cls == "lsq" and not self.grid.is_float
        self.dynamic = spec.dynamic
        self._whole = has_whole_offsets(spec)
        self._observer = observer_of(spec)
        self.observing = False
        self.rounding = False
        if self.learned:
            self.scale = nn.Parameter(torch.ones(groups))
        else:
            self.register_buffer("scale", torch.ones(groups))
        self.register_buffer("offset", torch.zeros(groups))
        self.register_buffer("known", torch.tensor(self.dynamic))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        for key, value in self._observer.init(groups).items():
            self.register_buffer(f"stat_{key}", value)

    def forward(self, x: Tensor) -> Tensor:
        """`x`, rounded where that is switched on and a range is known."""
        if self.observing and not torch.compiler.is_compiling():
            with torch.no_grad():
                self.observe(x.detach())
        if not self.rounding:
            return x
        if self.dynamic:
            return self._rounded_by_range(x)
        if not self._ready():
            return x
        return self._rounded(x, self.scale, self.offset if has_offset(self.spec) else None)

    def _ready(self) -> bool:
        if torch.compiler.is_compiling():
            return True
        return bool(self.known)

    def _axis(self) -> int | None:
        granularity = self.spec.granularity
        return granularity.axis if isinstance(granularity, PerChannelGranularity) else None

    def _split(self, x: Tensor) -> Tensor:
        axis = self._axis()
        if axis is None:
            return x.reshape(1, -1)
        return Blocks.along(x.shape, axis % x.ndim, 1).split(x)

    def _rounded(self, x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        axis = self._axis()
        if axis is None and not self.learned:
            return round_tensor(x, scale, offset, self.grid, whole=self._whole)
        blocks = Blocks.whole(x.shape) if axis is None else Blocks.along(x.shape, axis % x.ndim, 1)
        parts = blocks.split(x)
        if self.learned:
            return blocks.join(learned_round(parts, scale, offset, self.grid, whole=self._whole))
        return blocks.join(round_groups(parts, scale, offset, self.grid, whole=self._whole))

    def _rounded_by_range(self, x: Tensor) -> Tensor:
        """`graphopt.ops.round_by_range` with straight-through gradients."""
        if x.numel() == 0:
            return x
        blocks = Blocks.of(x.shape, value_block_sizes(self.spec.granularity, x.shape))
        parts = blocks.split(x)
        low, high = torch.aminmax(parts.detach(), dim=1)
        scale, offset = qparams(low, high, self.spec)
        return blocks.join(round_groups(parts, scale, offset, self.grid, whole=self._whole))

    # --- statistics -----------------------------------------------------------------------------
    def reset(self) -> None:
        """Forget everything seen."""
        for key, value in self._observer.init(self.groups).items():
            setattr(self, f"stat_{key}", value.to(self.scale.device))
        self.seen.zero_()
        self.known.fill_(self.dynamic)

    def observe(self, x: Tensor) -> None:
        """Enter a tensor into the statistics; in training the range follows at once."""
        if x.numel() == 0 or self.dynamic:
            return
        state = self._observer.update(self._state(), self._split(x))
        for key, value in state.items():
            setattr(self, f"stat_{key}", value)
        self.seen += 1
        due = not self._observer.costly or int(self.seen) % _COSTLY_PERIOD == 1
        if self.training and due and not (self.learned and bool(self.known)):
            self.settle()

    def _state(self) -> dict[str, Tensor]:
        prefix = "stat_"
        buffers = self._buffers.items()
        return {
            k.removeprefix(prefix): v for k, v in buffers if k.startswith(prefix) and v is not None
        }

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Lower and upper ends, [groups]; NaN where nothing usable was seen."""
        low, high = self._observer.range(self._state(), self.spec)
        fixed_low, fixed_high = self.spec.float_range
        if fixed_low is not None:
            low = torch.full_like(low, fixed_low)
        if fixed_high is not None:
            high = torch.full_like(high, fixed_high)
        return low, high

    def settle(self) -> None:
        """Compute the scale from what was seen."""
        if self.dynamic:
            return
        low, high = self.observed_range()
        if self.problem(low, high):
            self.known.zero_()
            return
        scale, offset = qparams(low, high, self.spec)
        self.scale.data = scale.to(self.scale.device)
        self.offset = torch.zeros_like(scale) if offset is None else offset
        self.known.fill_(True)

    def hold(self, scale: Tensor, offset: Tensor | None) -> None:
        """Round with a given scale and offset, [groups], from now on."""
        self.scale.data = scale.detach().reshape(-1).to(self.scale)
        zeros = torch.zeros_like(self.scale.data)
        self.offset = zeros if offset is None else offset.detach().reshape(-1).to(zeros)
        self.known.fill_(True)
        self.observing, self.rounding = False, True

    def problem(self, low: Tensor, high: Tensor) -> str:
        """Why a range cannot be used, or ""."""
        pinned = all(end is not None for end in self.spec.float_range)
        if not pinned and int(self.seen) == 0:
            return "was never observed"
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            return "saw NaN or Inf"
        if bool((low > high).any()):
            return f"has the empty range [{float(low.max()):g}, {float(high.min()):g}]"
        return ""

    def parameters_of(self) -> QParams:
        """Scale and offset, [groups]; learned scales as they are now."""
        scale = self.scale.detach().abs().clamp(min=torch.finfo(torch.float32).tiny)
        offset = self.offset.detach()
        return scale.clone(), (offset.clone() if bool(offset.any()) else None)

    def extra_repr(self) -> str:
        """Spec and range for print()."""
        text = f"{str(self.spec.dtype).removeprefix('torch.')}, {self.spec.qscheme.value}"
        if self.dynamic:
            return f"{text}, scales from each tensor"
        if bool(self.known) and self.groups == 1:
            text += f", scale={float(self.scale.detach()):.4g}, offset={float(self.offset):g}"
        if math.isfinite(float(self.seen)):
            text += f", seen={int(self.seen)}"
        return text
