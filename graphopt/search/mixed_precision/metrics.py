"""Metrics: how far a compressed model's outputs are from the uncompressed one's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from graphopt.errors import InputError

__all__ = ["METRICS", "Metric", "as_metric", "measure", "shown"]

Compare = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Metric:
    """A comparison of one output with its reference, and what it means for a sum over layers.

    Attributes:
        name: Its name in tables.
        compare: `(output, reference) → value` on one output of a batch.
        larger_is_better: Direction of the value.
        loss: Value → a loss of 0 for equal outputs that adds up over layers. Neither decibels nor
            cosines add up, the noise that they stand for does.
        value: Inverse of `loss`.

    Examples:
        >>> from graphopt.mixed_precision import METRICS
        >>> METRICS["mse"].compare(torch.zeros(4), torch.ones(4))
        1.0
    """

    name: str
    compare: Compare
    larger_is_better: bool
    loss: Callable[[float], float]
    value: Callable[[float], float]


_LOWEST = -1e30  # a logit of no weight


def _held(output: Tensor, reference: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """Both in float64, with a number where they agree on a value that is not finite.

    A mask puts -inf there; where they do not agree the error stays infinite.
    """
    output, reference = output.double(), reference.double()
    masked = ~torch.isfinite(reference)
    if not bool(masked.any()):
        return output, reference
    agreed = masked & ((output == reference) | (output.isnan() & reference.isnan()))
    return output.masked_fill(agreed, fill), reference.masked_fill(agreed, fill)


def _psnr(output: Tensor, reference: Tensor) -> float:
    """10·log10(max(reference²) / mean((reference − output)²)), in dB; the peak is the reference's."""
    output, reference = _held(output, reference)
    error = float((output - reference).square().mean())
    peak = float(reference.square().max())
    if error == 0:
        return math.inf
    return 10 * math.log10(peak / error) if peak > 0 else -math.inf


def _mse(output: Tensor, reference: Tensor) -> float:
    output, reference = _held(output, reference)
    return float((output - reference).square().mean())


def _kl(output: Tensor, reference: Tensor) -> float:
    """Mean KL(reference ‖ output) in nats; logits along the last axis."""
    output, reference = _held(output, reference, _LOWEST)
    wanted = reference.log_softmax(-1)
    got = output.log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


def _cosine(output: Tensor, reference: Tensor) -> float:
    """Mean cosine similarity along the last axis."""
    return float(torch.cosine_similarity(*_held(output, reference), dim=-1).mean())


def _top1(output: Tensor, reference: Tensor) -> float:
    """Share of positions with the same largest entry along the last axis."""
    output, reference = _held(output, reference, _LOWEST)
    return float((output.argmax(-1) == reference.argmax(-1)).double().mean())


def _noise(decibels: float) -> float:
    return 0.0 if decibels == math.inf else 10 ** (-decibels / 10)


def _decibels(noise: float) -> float:
    return math.inf if noise <= 0 else -10 * math.log10(noise)


def _same(value: float) -> float:
    return value


def _rest(value: float) -> float:
    return 1 - value


def _across(cosine: float) -> float:
    """Half the noise-to-signal ratio of which `cosine` is left; 1 − cosine where that is small."""
    return 0.5 / max(cosine, 1e-3) ** 2 - 0.5


def _along(loss: float) -> float:
    return float((1 + 2 * max(loss, 0.0)) ** -0.5)


METRICS: dict[str, Metric] = {
    "psnr": Metric("psnr", _psnr, True, _noise, _decibels),
    "mse": Metric("mse", _mse, False, _same, _same),
    "kl": Metric("kl", _kl, False, _same, _same),
    "cosine": Metric("cosine", _cosine, True, _across, _along),
    "top1": Metric("top1", _top1, True, _rest, _rest),
}


def shown(name: str, value: float) -> str:
    """A value of a metric for people: decibels with one digit, others with four."""
    if name != "psnr":
        return f"{value:.4g}"
    return "exact" if value == math.inf else f"{value:.1f} dB"


def as_metric(given: str | Compare | Metric) -> Metric:
    """A metric by its name, or from the user's `(output, reference) → float`.

    A callable counts as better when larger unless it has an attribute `larger_is_better = False`;
    its loss is its distance from the value of equal outputs, which is taken to be 1 where larger is
    better and 0 where smaller is, or its attribute `best`.

    Raises:
        InputError: The name is unknown.
    """
    if isinstance(given, Metric):
        return given
    if isinstance(given, str):
        if given not in METRICS:
            raise InputError(f"no metric {given!r}; use one of {sorted(METRICS)} or a callable")
        return METRICS[given]
    if not callable(given):
        raise InputError(f"a metric is a name or a callable, got {type(given).__name__}")
    larger = bool(getattr(given, "larger_is_better", True))
    best = float(getattr(given, "best", 1.0 if larger else 0.0))
    sign = -1.0 if larger else 1.0
    name = str(getattr(given, "__name__", type(given).__name__))
    loss, value = partial(_distance, sign, best), partial(_inverse, sign, best)
    return Metric(name, given, larger, loss, value)


def _distance(sign: float, best: float, value: float) -> float:
    return sign * (value - best)


def _inverse(sign: float, best: float, loss: float) -> float:
    return best + sign * loss


def measure(metric: Metric, outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The metric's mean over the floating-point outputs of a batch.

    Raises:
        InputError: There is no such output.
    """
    pairs = [
        (got, want)
        for got, want in zip(outputs, reference, strict=True)
        if want.is_floating_point() and want.numel()
    ]
    if not pairs:
        raise InputError("the model returns no floating-point tensor to compare")
    values = [float(metric.compare(got, want)) for got, want in pairs]
    return sum(values) / len(values)
