"""What one layer is fitted to: the outputs of the exact program, as far as its inputs can tell them.

A layer behind compressed ones gets inputs x̂ that differ from the exact x. Its target is the output of
the exact layer on exact inputs: the regression `W* = W + W·E[(x − x̂)x̂ᵀ]·(E[x̂x̂ᵀ] + λI)⁻¹` (the
asymmetric calibration of GPTAQ, Li et al., arXiv 2504.02692, equation 6, with a ridge) makes up for
what the inputs have lost, and a bias for the mean. What the other operand of the sum behind a layer
has lost (a residual stream, another embedding) is added to the target, as far as the layer's inputs
can tell it. Positions count by the square root of their saliency, so that padding does not count.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from graphopt.analysis.matrix_form import MatrixUse, WeightUse
from graphopt.ir import op_info
from graphopt.ir.mapped import is_mapped, release
from graphopt.numerics.device import chosen_device
from graphopt.run.layerwise import LayerwiseRun

__all__ = [
    "LayerMoments",
    "Sample",
    "bias_change",
    "bias_of",
    "collect_moments",
    "compensated_weight",
    "missing_beside",
    "operand_beside",
]

_RIDGE = 0.3  # λ relative to the mean diagonal


@dataclass(frozen=True)
class Sample:
    """Which positions of a layer's inputs its moments are means over: of neighbours some suffice.

    Attributes:
        seed: Of the choice.
        positions: As many,
        per_column: or so many times the length of a column, if that is more.
    """

    seed: int
    positions: int = 16_384
    per_column: int = 8

    def of(self, columns: int) -> int:
        """Positions for a matrix of so many columns."""
        return max(self.positions, self.per_column * columns)


@dataclass(frozen=True)
class LayerMoments:
    """Means over sampled positions, per channel group; second moments float32, means float64.

    Attributes:
        hessian: E[x̂x̂ᵀ], [groups, columns, columns]; of centred columns where a bias takes the mean.
        shift: E[(x − x̂)x̂ᵀ], of the same shape.
        mean: E[x̂], [groups, columns].
        wanted: E[x], [groups, columns].
        beside: E[(r − r̂)x̂ᵀ] of what is added to the outputs, [groups, rows, columns], or a scalar 0.
        beside_mean: E[r − r̂], [groups, rows], or a scalar 0.
        squares: For the Hessian, the shift and what stands beside the op the mean square of the products
            that they are means of, summed up, without the diagonals of the first two, [3, groups].
        samples: Number of positions, by their weights; infinite where the moments are known exactly.
    """

    hessian: Tensor
    shift: Tensor
    mean: Tensor
    wanted: Tensor
    beside: Tensor
    beside_mean: Tensor
    squares: Tensor
    samples: float = math.inf

    def shrunk(self) -> LayerMoments:
        """These, drawn towards what is sure as far as so few samples leave them unsure.

        The Hessian is drawn towards its diagonal and so is the shift, no farther, as both are of the same
        inputs; what stands beside the op towards 0. The shares are those of the smallest expected squared error: the
        sum of the variances of what is drawn, as the samples themselves show them, over the sum of its
        squares (Schäfer and Strimmer, "A shrinkage approach to large-scale covariance matrix estimation",
        2005, target D).
        """
        shares = [
            self._share(squares, _beside_diagonal(moment))
            for squares, moment in zip(self.squares, (self.hessian, self.shift), strict=False)
        ]
        hessian = _drawn(self.hessian, shares[0])
        shift = _drawn(self.shift, torch.minimum(*shares))
        beside = self.beside
        if beside.ndim:
            size = _squares(beside)
            beside = beside * (1 - self._share(self.squares[2], size))
        return replace(self, hessian=hessian, shift=shift, beside=beside)

    def _share(self, squares: Tensor, size: Tensor) -> Tensor:
        """Variance over square, [groups, 1, 1] float32, of means with these squares of what they average."""
        unsure = (squares - size).clamp_min(0.0) / self.samples
        share = (unsure / size.clamp_min(1e-300)).clamp(0.0, 1.0)
        return torch.where(size > 0, share, 0.0).float()[:, None, None]


def missing_beside(
    use: WeightUse, run: LayerwiseRun, reference: LayerwiseRun, partners: Mapping[fx.Node, fx.Node]
) -> list[tuple[Tensor, Tensor]] | None:
    """The other operand of the sum behind the op, as it should be and as it is, where known already.

    Args:
        use: The op.
        run: The program that is being compressed.
        reference: The exact one.
        partners: Nodes of the first → nodes of the second.
    """
    other = operand_beside(use, partners)
    if other is None or not run.has_run(other):
        return None
    return list(zip(reference.values(partners[other]), run.values(other), strict=True))


def operand_beside(use: WeightUse, partners: Container[fx.Node]) -> fx.Node | None:
    """The other operand of the sum behind an op, where its error can be told for each row.

    Args:
        use: The op.
        partners: Nodes that the exact program has as well.
    """
    node, shape = use.node, _shape(use.node)
    if use.form.kind == "transposed":
        return None
    while len(node.users) == 1:
        reader = next(iter(node.users))
        info = op_info.info_of(reader)
        if info is not None and info.sums:
            left, right = reader.args[:2]
            other = right if left is node else left
            if not isinstance(other, fx.Node) or reader.kwargs or other not in partners:
                return None
            return other if node is not other and _fits(_shape(other), shape, use) else None
        if info is None or not info.copies:
            return None
        node = reader
    return None


def _fits(other: tuple[object, ...] | None, own: tuple[object, ...] | None, use: WeightUse) -> bool:
    """Whether an operand's error can be told for each row of the op's matrix."""
    if use.form.kind == "embedding":
        return bool(other and own and other[-1] == own[-1])
    return other == own


def _shape(node: fx.Node) -> tuple[object, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def bias_of(use: WeightUse) -> fx.Node | None:
    """The constant that an op alone adds to each row of its weight's matrix."""
    info = op_info.info_of(use.node)
    slot = None if info is None else info.slot(use.position)
    if slot is None or use.form.kind == "transposed":
        return None  # a row of a transposed convolution's matrix is no output channel
    bias = op_info.argument(use.node, slot.bias)
    alone = isinstance(bias, fx.Node) and bias.op == "get_attr" and set(bias.users) == {use.node}
    return bias if alone and isinstance(bias, fx.Node) else None


def collect_moments(
    use: MatrixUse,
    inputs: Sequence[Tensor],
    wanted: Sequence[Tensor],
    saliency: Sequence[Tensor] | None,
    missing: Sequence[tuple[Tensor, Tensor]] | None,
    *,
    centred: bool,
    sample: Sample,
) -> LayerMoments | None:
    """Moments of a layer's inputs; None where calibration never reached the layer.

    Columns are counted from near their mean, so that features far from 0 keep their variance.

    Args:
        use: The op.
        inputs: Its input for each batch.
        wanted: Its input in the exact program.
        saliency: Per batch [batch, positions], or None for all alike.
        missing: What `missing_beside` has found.
        centred: Whether a bias takes the mean.
        sample: Which positions count.
    """
    hessian = shift = mean = lost = beside = beside_mean = torch.zeros(())
    powers = torch.zeros(3, 1, dtype=torch.float64)
    total, squares, origin = 0.0, 0.0, None
    generator = torch.Generator().manual_seed(sample.seed)
    device = chosen_device() or torch.device("cpu")
    for number, (x, y) in enumerate(zip(inputs, wanted, strict=True)):
        if not x.numel() or x.shape != y.shape:
            continue  # nothing was routed to the layer, or not the same as in the exact program
        counts = use.form.count(x)
        weight = torch.ones(counts[:2])
        if saliency is not None and saliency[number].shape == weight.shape:
            weight = saliency[number].float().sqrt()
        used = weight.reshape(-1).nonzero()[:, 0]
        share = sample.of(counts[2]) / len(inputs)
        if len(used) > share:
            # neighbouring positions say the same: a sample of them suffices
            used = used[torch.randperm(len(used), generator=generator)[: math.ceil(share)]]
        flat, used = weight.reshape(-1)[used].reshape(1, -1, 1), used.to(device)
        columns, exact = (use.form.sampled(value.to(device), used).float() for value in (x, y))
        total += float(flat.double().sum())
        squares += float(flat.double().square().sum())
        flat = flat.to(device)
        error = exact - columns
        if origin is None:
            origin = columns.mean(1, keepdim=True)
        columns = columns - origin
        weighted = columns if saliency is None else columns * flat
        hessian = hessian.to(device) + weighted.mT @ columns
        shift = shift.to(device) + error.mT @ weighted
        mean = mean.to(device) + weighted.sum(1)
        lost = lost.to(device) + (error * flat).sum(1)
        rest = None
        if missing is not None:
            lacks = (missing[number][0].float() - missing[number][1].float()).to(device)
            rest = use.form.rows(lacks, x).transpose(0, 1).flatten(1, 2)[:, used]
            beside = beside.to(device) + rest.mT @ weighted
            beside_mean = beside_mean.to(device) + (rest * flat).sum(1)
        powers = powers + _powers(columns, error, rest, flat)
        for value in (x, y) if missing is None else (x, y, *missing[number]):
            if is_mapped(value):
                release(value)
    if origin is None or total <= 0:
        return None
    hessian, shift, beside, origin = (part.cpu() for part in (hessian, shift, beside, origin))
    origin = origin.double()
    mean, lost, beside_mean = (part.cpu().double() / total for part in (mean, lost, beside_mean))
    # the moments about the mean, or about 0
    base = -mean if centred else origin[:, 0]
    hessian = _plus_outer(_plus_outer(hessian / total, mean, base), base, mean + base)
    shift, beside = _plus_outer(shift / total, lost, base), beside / total
    if missing is not None:
        beside = _plus_outer(beside, beside_mean, base)
    centre = mean + origin[:, 0]
    means, samples = (centre, centre + lost, beside, beside_mean), total * total / squares
    return LayerMoments(hessian, shift, *means, powers / total, samples)


def _beside_diagonal(moment: Tensor) -> Tensor:
    """Sum of the squares that stand beside the diagonal, [groups]."""
    return _squares(moment) - moment.diagonal(dim1=1, dim2=2).double().square().sum(1)


def _squares(moment: Tensor) -> Tensor:
    """Sum of squares, [groups] float64, of float32 sums of rows."""
    return torch.linalg.vecdot(moment, moment).double().sum(1)


def _drawn(moment: Tensor, share: Tensor) -> Tensor:
    drawn = moment * (1 - share)
    drawn.diagonal(dim1=1, dim2=2).copy_(moment.diagonal(dim1=1, dim2=2))
    return drawn


def _powers(columns: Tensor, error: Tensor, rest: Tensor | None, weight: Tensor) -> Tensor:
    """Sums over positions of the squared products that second moments add up, [3, groups]."""
    inputs, both = columns.square(), columns * error
    power, errors = inputs.sum(2), torch.linalg.vecdot(error, error)
    found = [power.square() - torch.linalg.vecdot(inputs, inputs)]
    found.append(errors * power - torch.linalg.vecdot(both, both))
    found.append(
        torch.zeros_like(power) if rest is None else torch.linalg.vecdot(rest, rest) * power
    )
    return (torch.stack(found) * weight[..., 0]).sum(2).cpu().double()


def _plus_outer(moments: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Outer products of means added in place, [groups, rows, columns]."""
    return moments.baddbmm_(left.float()[:, :, None], right.float()[:, None, :])


def compensated_weight(use: MatrixUse, weight: Tensor, moments: LayerMoments) -> Tensor:
    """The weight that on the inputs as they are comes closest to the exact outputs."""
    home = chosen_device() or weight.device
    matrix = use.matrix(weight, casts=False).to(home).float()
    hessian, shift, beside = (
        part.to(home) for part in (moments.hessian.clone(), moments.shift, moments.beside)
    )
    # so large a ridge leaves a matrix that float32 can solve
    ridge = _RIDGE * hessian.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    hessian.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if bool(failed.any()):  # in exact numbers it is definite
        moved = torch.linalg.solve(hessian, (matrix @ shift + beside).mT).mT
    else:
        moved = torch.cholesky_solve((matrix @ shift + beside).mT, lower).mT
    wanted = (matrix + moved).to(weight.device)
    return use.pull_back(wanted, weight.shape).to(weight.dtype).contiguous()


def bias_change(use: MatrixUse, exact: Tensor, compressed: Tensor, moments: LayerMoments) -> Tensor:
    """What the op's bias must take up so that the mean of its outputs is right, [rows], float64.

    Args:
        use: The op.
        exact: The stored weight.
        compressed: What takes its place.
        moments: Of the op's inputs.
    """
    right = use.matrix(exact, casts=False).double() @ moments.wanted.double()[..., None]
    wrong = use.matrix(compressed, casts=False).double() @ moments.mean.double()[..., None]
    return (right - wrong).reshape(-1) + moments.beside_mean.double().reshape(-1)
