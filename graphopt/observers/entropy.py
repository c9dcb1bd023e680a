"""The clipping range that keeps most information (Kullback–Leibler)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from graphopt.extras import deferred
from graphopt.numerics.affine import grid_of, scale_limits
from graphopt.numerics.parallel import map_tasks
from graphopt.observers.base import State, range_seen
from graphopt.observers.histogram import HistogramObserver, bin_centres
from graphopt.specs import QuantizationSpec

if TYPE_CHECKING:
    from graphopt.numerics import kernels_divergence as kernels
else:
    kernels = deferred("graphopt.numerics.kernels_divergence")

__all__ = ["EntropyObserver"]

_ROUNDING = 1e-12
_RATIOS = tuple(1.0 - 0.01 * step for step in range(80))


@dataclass(frozen=True)
class EntropyObserver(HistogramObserver):
    """Range of least divergence between the clipped histogram and its quantized form.

    For every candidate range the values outside are added to the outermost bins (P); the bins of one
    quantization level then share their mean over those that are not empty (Q); the range with the
    least `Σ P log(P / Q)` is taken. (Migacz, "8-bit Inference with TensorRT", GTC 2017.)

    Examples:
        >>> observer = EntropyObserver()
        >>> spec = graphopt.quantization.QuantizationSpec(dtype="int8")
        >>> state = observer.update(observer.init(1), torch.linspace(-1, 1, 1001)[None])
        >>> low, high = observer.range(state, spec)
        >>> low.shape, bool(0.9 < high <= 1.01)
        (torch.Size([1]), True)
    """

    name: ClassVar[str] = "entropy"

    @override
    def range(self, state: State, spec: QuantizationSpec) -> tuple[Tensor, Tensor]:
        low, high = range_seen(state)
        starts, ends = low.clamp(max=0), high.clamp(min=0)
        if scale_limits(spec) == "magnitude":
            ends = torch.maximum(-starts, ends)
            starts = -ends
        centres, counts = bin_centres(state).numpy(), state["counts"].numpy()
        whole, ratios = torch.stack([starts, ends], dim=1).numpy(), np.array(_RATIOS, np.float32)
        levels = 2 ** grid_of(spec).bits

        def best(group: int) -> int:
            divergences = np.empty(ratios.size)
            kernels.divergences(
                centres[group], counts[group], whole[group], ratios, levels, divergences
            )
            # of ranges that differ by rounding alone the widest
            return int((divergences <= divergences.min() + _ROUNDING).argmax())

        seen = low <= high
        groups = torch.nonzero(seen).flatten().tolist()
        shares = torch.ones_like(low)
        shares[seen] = torch.from_numpy(ratios)[list(map_tasks(best, groups))]
        return torch.where(seen, starts * shares, low), torch.where(seen, ends * shares, high)
