"""Attention of other ranks, batches and masks than the standard's op has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.together import together
from torch import Tensor, nn

import graphopt

pytestmark = [pytest.mark.onnx, pytest.mark.integration]


class Attends(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k * 2, mask, **self.options)


def of(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


CASES: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "a matrix": (Attends(), (of(5, 8), of(7, 8))),
    "three axes": (Attends(is_causal=True), (of(2, 5, 8), of(2, 7, 8))),
    "three axes, heads": (Attends(enable_gqa=True), (of(4, 5, 8), of(2, 7, 8))),
    "five axes": (Attends(), (of(2, 3, 4, 5, 8), of(2, 1, 4, 7, 8), of(3, 1, 5, 7))),
    "one batch of keys": (Attends(), (of(2, 4, 5, 8), of(1, 4, 7, 8), of(2, 4, 5, 7))),
    "one head of keys": (Attends(scale=0.3), (of(2, 4, 5, 8), of(2, 1, 7, 8))),
    "keys that are masked": (Attends(), (of(2, 4, 5, 8), of(2, 4, 7, 8), of(2, 1, 1, 7) > 0)),
    "shared heads, mask": (Attends(enable_gqa=True), (of(2, 4, 5, 8), of(2, 2, 7, 8), of(1, 7))),
    "one number a query": (Attends(), (of(2, 4, 5, 8), of(2, 4, 7, 8), of(5, 1))),
}


def test_what_torch_broadcasts_is_right_in_one_op(tmp_path: Path) -> None:
    model, call = together(CASES, CASES)
    artifact: Any = graphopt.lower(model, "onnx", call, dynamic=False)
    artifact.save(tmp_path / "net.onnx")
    assert artifact.verification.max_error < 1e-6
    kinds = [node.op_type for node in artifact.model.graph]
    assert kinds.count("Attention") == len(CASES)


class Padded(nn.Module):
    """An encoder's layer with two heads of keys for four of queries, and a mask of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (self.q(x), self.k(x)))
        return F.scaled_dot_product_attention(q, k, k, mask[:, None, None], enable_gqa=True)


def test_masks_of_keys_take_other_batches_and_lengths(tmp_path: Path) -> None:
    artifact = graphopt.lower(Padded().eval(), "onnx", (of(1, 6, 16), of(1, 6) > -1))
    artifact.save(tmp_path / "net.onnx")
    assert artifact.verify(of(3, 9, 16), of(3, 9) > -1).max_error < 1e-5
