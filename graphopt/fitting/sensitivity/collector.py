"""Collect squared gradients per sample while a user's own forward and backward passes run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from graphopt.analysis.matrix_form import WeightUse
from graphopt.fitting.sensitivity.storage import allocate

__all__ = ["GradientCollector", "GradientTap", "WeightTap"]

_FEW_POSITIONS = 32  # below, convolutions are unfolded
_CHUNK = 1 << 21  # elements of columns and per-sample gradients that exist at a time


class GradientCollector:
    """Sums over samples of the squared gradient of every weight, and of the positions of every op.

    The first dimension of an op's input counts samples. A model that merges it with another one
    inside (as attention with `batch_first=False` does) has more, smaller samples there, and a weight
    that several ops read adds up the squares of each.

    Attributes:
        sums: Name of the weight → Σ over samples of squared gradients, of the weight's shape.
        saliency: Name of the op's node → one tensor [batch, positions] per call: mean squared
            gradient of the output at each position, with mean 1 over each sample.
        spread: Name of an embedding's node → Σ g gᵀ over positions of the output's gradient, [rows, rows].
        samples: Number of samples seen.
        scale: Factor that turns gradients of the loss into gradients of one sample's loss.
    """

    def __init__(
        self,
        *,
        per_sample: bool = True,
        squares: bool = True,
        positions: bool = False,
        folder: Path | None = None,
    ) -> None:
        self.per_sample = per_sample
        self.squares = squares
        self.positions = positions
        self.folder = folder
        self.sums: dict[str, Tensor] = {}
        self.saliency: dict[str, list[Tensor]] = {}
        self.spread: dict[str, Tensor] = {}
        self.samples = 0
        self.scale = 1.0
        self._factors: dict[tuple[str, WeightUse], tuple[torch.Size, Tensor, Tensor]] = {}

    @torch.no_grad()
    def record(
        self, name: str, use: WeightUse, shape: torch.Size, x: Tensor, gradient: Tensor
    ) -> None:
        """Take in one backward pass through one op.

        Args:
            name: Name of the weight.
            use: The op.
            shape: Shape of the stored weight.
            x: Its input.
            gradient: Gradient of the loss at its output.
        """
        if not x.numel():  # nothing was routed to the op
            if self.positions:
                self.saliency.setdefault(use.node.name, []).append(x.new_zeros(0, 0))
            return
        rows = use.form.rows(gradient.float() * self.scale, x)  # batch, groups, positions, rows
        if self.positions:
            squared = rows.square().mean((1, 3))
            level = squared.mean(1, keepdim=True)
            relative = torch.where(level > 0, squared / level.clamp_min(1e-38), 0.0)
            self.saliency.setdefault(use.node.name, []).append(relative)
            if use.form.kind == "embedding":
                flat = rows.flatten(0, 2)
                self.spread[use.node.name] = self.spread.get(use.node.name, 0) + flat.mT @ flat
        if not self.squares:
            return
        if use.form.kind == "embedding":
            self._add(name, shape, _embedding_squares(x, rows[:, 0], shape))
            return
        if self.per_sample:
            squares = _kernel_squares(gradient.float() * self.scale, use, x)
            if squares is None:
                squares = _squares(rows, use, x)
            self._add(name, shape, use.pull_back(squares, shape))
            return
        columns = use.form.columns(x.float())
        sums = (shape, rows.square().sum((0, 2)), columns.square().sum((0, 2)))
        old = self._factors.get((name, use))
        if old is not None:
            sums = (shape, sums[1] + old[1], sums[2] + old[2])
        self._factors[name, use] = sums

    @torch.no_grad()
    def record_batch(self, name: str, gradient: Tensor) -> None:
        """Take in the gradient of a weight whose samples cannot be told apart."""
        if self.squares:
            self._add(name, gradient.shape, (gradient.float() * self.scale).square())

    def finish(self) -> dict[str, Tensor]:
        """Mean squared gradient of every weight that was reached."""
        for (name, use), (shape, rows, columns) in self._factors.items():
            product = rows[:, :, None] * columns[:, None, :] / max(self.samples, 1)
            self._add(name, shape, use.pull_back(product, shape))
        self._factors.clear()
        for value in self.sums.values():
            value /= max(self.samples, 1)
        self.samples = 1 if self.sums else 0
        return self.sums

    def _add(self, name: str, shape: torch.Size, value: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = allocate(name, shape, self.folder)
        self.sums[name] += value.to(self.sums[name].device)


def _kernel_squares(gradient: Tensor, use: WeightUse, x: Tensor) -> Tensor | None:
    """`_squares` of a convolution with many positions, by its own kernel and without unfolding.

    None where the kernel does not apply: other ops, uneven padding, or so few positions that one
    matrix product for many samples is quicker.
    """
    form = use.form
    if not form.is_even_convolution or x.ndim != len(form.kernel) + 2:
        return None
    if gradient[0, 0].numel() < _FEW_POSITIONS:
        return None
    total = torch.zeros(())
    for own, data in zip(gradient.split(1), x.float().split(1), strict=True):
        one = form.convolution_gradient(own, data)
        total = one.square_() if total.ndim == 0 else total.addcmul_(one, one)
    return total.reshape(form.groups, gradient.shape[1] // form.groups, -1)


def _squares(rows: Tensor, use: WeightUse, x: Tensor) -> Tensor:
    """Σ over samples of (Σ over positions of row · column)², [groups, rows, columns]."""
    if rows.shape[2] == 1:
        columns = use.form.columns(x.float())
        left = rows[:, :, 0].square().permute(1, 2, 0)
        return left @ columns[:, :, 0].square().transpose(0, 1)
    total = rows.new_zeros(())
    for start, samples in _samples(rows, use, x):
        columns = use.form.columns(samples.float())
        part = rows[start : start + columns.shape[0]]
        total = total + (part.mT @ columns).square_().sum(0)
    return total


def _samples(rows: Tensor, use: WeightUse, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Parts of an input whose columns and gradients are small enough."""
    batch, groups, positions, height = rows.shape
    if x.shape[0] != batch:
        yield 0, x
        return
    width = use.form.columns(x[:1].float()).shape[-1]
    step = max(1, _CHUNK // (groups * width * (height + positions)))
    for start in range(0, batch, step):
        yield start, x[start : start + step]


def _embedding_squares(indices: Tensor, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """The same for a table of rows: a sample's gradient of a row sums over its occurrences."""
    batch = rows.shape[0]
    ids = indices.reshape(batch, -1) + torch.arange(batch)[:, None] * shape[0]
    unique, places = ids.reshape(-1).unique(return_inverse=True)
    sums = rows.new_zeros(len(unique), shape[1])
    sums.index_add_(0, places, rows.reshape(-1, shape[1]))
    return rows.new_zeros(list(shape)).index_add_(0, unique % shape[0], sums.square_())


class GradientTap(nn.Module):
    """Stands behind an op and hands its input and the gradient of its output to a collector."""

    def __init__(
        self, collector: GradientCollector, name: str, use: WeightUse, shape: torch.Size
    ) -> None:
        super().__init__()
        self.collector = collector
        self.name = name
        self.use = use
        self.shape = shape

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """`y`, watched."""
        if not torch.is_grad_enabled():
            return y
        watched = y if y.requires_grad else y.detach().requires_grad_()
        seen = x.detach()

        def hook(gradient: Tensor) -> None:
            self.collector.record(self.name, self.use, self.shape, seen, gradient)

        watched.register_hook(hook)
        return watched


class WeightTap(nn.Module):
    """Stands behind a weight whose op has no matrix form, such as a recurrent layer's."""

    def __init__(self, collector: GradientCollector, name: str) -> None:
        super().__init__()
        self.collector = collector
        self.name = name

    def forward(self, weight: Tensor) -> Tensor:
        """`weight`, watched."""
        if not torch.is_grad_enabled():
            return weight
        watched = weight.detach().requires_grad_()

        def hook(gradient: Tensor) -> None:
            self.collector.record_batch(self.name, gradient)

        watched.register_hook(hook)
        return watched
