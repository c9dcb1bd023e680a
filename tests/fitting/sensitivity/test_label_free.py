"""Losses that need no labels: squared gradients of draws are a curvature."""

from __future__ import annotations

import pytest
import torch
from helpers.sensitivity_models import prepared, tapped
from torch import Tensor, nn

from graphopt.errors import InputError
from graphopt.fitting.sensitivity import (
    GradientCollector,
    label_free_loss,
)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def gauss_newton(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Σ over outputs of their squared gradients."""
    found = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for output in model(x).flatten():
        gradients = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
        for name, gradient in zip(found, gradients, strict=True):
            found[name] += gradient.square()
    return found


def fisher(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Σ over classes of p · the squared gradient of log p."""
    found = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    scores = model(x).log_softmax(-1).flatten()
    for score in scores:
        gradients = torch.autograd.grad(score, list(model.parameters()), retain_graph=True)
        for name, gradient in zip(found, gradients, strict=True):
            found[name] += score.detach().exp() * gradient.square()
    return found


CURVATURES = {"mse": gauss_newton, "kl": fisher}


@pytest.mark.parametrize("kind", CURVATURES)
def test_squared_gradients_of_many_draws_are_the_curvature(kind: str) -> None:
    model, x = TwoLayers().eval(), torch.randn(1, 3)
    expected = CURVATURES[kind](model, x)
    draws = 20_000
    collector = GradientCollector()
    gm = tapped(prepared(model, torch.randn(2, 3)), collector)
    output = gm(x.expand(draws, -1))
    label_free_loss(output, torch.Generator().manual_seed(0), kind).backward()
    collector.samples = draws
    found = collector.finish()
    for name in ("first.weight", "second.weight"):
        largest = float(expected[name].max())
        torch.testing.assert_close(found[name], expected[name], rtol=0.08, atol=0.01 * largest)
    other = CURVATURES["kl" if kind == "mse" else "mse"](model, x)["first.weight"]
    assert float((found["first.weight"] / other).log().abs().min()) > 0.3


def test_logits_of_a_sequence_are_drawn_position_by_position() -> None:
    logits = torch.randn(1, 2, 3).expand(30_000, -1, -1).requires_grad_()
    # rows of onehot − p: their mean is zero, their covariance that of a categorical draw
    (drawn,) = torch.autograd.grad(
        label_free_loss(logits, torch.Generator().manual_seed(0), "kl"), logits
    )
    p = logits[0].detach().softmax(-1)
    torch.testing.assert_close(drawn.mean(0), torch.zeros(2, 3), rtol=0, atol=0.015)
    for place in range(2):
        covariance = drawn[:, place].T @ drawn[:, place] / len(drawn)
        expected = torch.diag(p[place]) - torch.outer(p[place], p[place])
        torch.testing.assert_close(covariance, expected, rtol=0, atol=0.015)
    across = drawn[:, 0].T @ drawn[:, 1] / len(drawn)
    torch.testing.assert_close(across, torch.zeros(3, 3), rtol=0, atol=0.015)


def test_every_floating_output_takes_part() -> None:
    parts = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    output = {"a": (parts[0], torch.tensor([1, 2])), "b": parts[1]}
    generator = torch.Generator().manual_seed(3)
    loss = label_free_loss(output, generator)
    again = torch.Generator().manual_seed(3)
    drawn = [torch.randn(2, 3, generator=again) for _ in range(2)]
    assert float(loss.detach()) == pytest.approx(
        float(sum((u * y.detach()).sum() for u, y in zip(drawn, parts, strict=True))), rel=1e-5
    )
    found = torch.autograd.grad(loss, parts)
    assert all(torch.equal(one, other) for one, other in zip(found, drawn, strict=True))


def test_the_loss_is_in_the_type_of_the_output() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        y = torch.randn(2, 3, dtype=dtype, requires_grad=True)
        for kind in CURVATURES:
            assert label_free_loss(y, torch.Generator(), kind).dtype is dtype


@pytest.mark.parametrize(
    ("output", "kind", "message"),
    [
        (torch.zeros(2, 3), "mae", "'mse' or 'kl'"),
        (torch.tensor([1, 2]), "mse", "no floating-point tensor"),
        ({}, "mse", "no floating-point tensor"),
    ],
)
def test_losses_that_cannot_be_taken_are_refused(output: object, kind: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        label_free_loss(output, torch.Generator(), kind)
