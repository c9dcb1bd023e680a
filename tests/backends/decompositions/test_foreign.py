"""Losses of a linear layer's logits that torch computes in pieces, in plain ops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.backends.decompositions.foreign import foreign_ops


class Loss(nn.Module):
    """The loss of a classifier, some of whose samples are ignored."""

    def __init__(self, reduction: str, weight: Tensor | None) -> None:
        super().__init__()
        self.layer, self.reduction, self.weight = nn.Linear(8, 5), reduction, weight

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(
            x,
            self.layer.weight,
            target,
            linear_bias=self.layer.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=2,
            options=nn.LinearCrossEntropyOptions(chunking_method="auto"),
        )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_losses_in_pieces_are_those_of_the_whole(reduction: str) -> None:
    torch.manual_seed(0)
    model = Loss(reduction, torch.rand(5)).requires_grad_(requires_grad=False).eval()
    x, target = torch.randn(9, 8), torch.randint(0, 5, (9,))
    program = torch.export.export(model, (x, target))
    names = {str(node.target) for node in program.graph.nodes}
    assert any("chunked" in name for name in names)
    plain = program.run_decompositions(foreign_ops())
    assert all(
        str(node.target).startswith("aten.") or node.op != "call_function"
        for node in plain.graph.nodes
    )
    logits = model.layer(x)
    wanted = F.cross_entropy(logits, target, model.weight, ignore_index=2, reduction=reduction)
    torch.testing.assert_close(plain.module()(x, target), wanted)
