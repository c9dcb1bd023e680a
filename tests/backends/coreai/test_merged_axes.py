"""Products with what is permuted and reshaped are right on the runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.backends.coreai.merged_axes import keep_merged_axes

pytestmark = pytest.mark.coreai

# of x [5, 16] and w [4, 16, 16]
CASES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "last axis first": lambda x, w: x @ w.permute(2, 1, 0).reshape(16, 64),
    "middle axis first": lambda x, w: x @ w.permute(1, 2, 0).reshape(16, 64),
    "in two steps": lambda x, w: x @ w.transpose(0, 1).transpose(1, 2).reshape(16, 64),
    "experts": lambda x, w: torch.einsum("td,edf->tef", x, w),
    "linear": lambda x, w: F.linear(x, w.permute(1, 2, 0).reshape(16, 64).t()),
    "batch": lambda x, w: torch.bmm(x[None], w.permute(1, 2, 0).reshape(1, 16, 64)),
    "one of a batch": lambda x, w: x @ w[None].permute(0, 2, 3, 1).reshape(1, 16, 64)[0],
    "stacked": lambda x, w: x @ torch.stack(list(w.unbind(0)), -1).reshape(16, 64),
    "read twice": lambda x, w: (x @ (m := w.permute(1, 2, 0).reshape(16, 64)), m.sum(0)),
}


class _Net(nn.Module):
    """Whose weight is an input, too."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 16, 16, generator=generator))
        self.function = function

    def forward(self, x: Tensor, w: Tensor) -> Any:
        return self.function(x, self.weight), self.function(x, w)


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_torch(name: str, tmp_path: Path) -> None:
    model, example = _Net(CASES[name]).eval(), (torch.randn(5, 16), torch.randn(4, 16, 16))
    made = graphopt.compress(model, example, {"palettization": {}}, backend="coreai")
    artifact = graphopt.lower(made, "coreai")
    artifact.save(tmp_path / "net.aimodel")
    assert artifact.verification.max_error < 1e-5


def test_attention_has_no_more_ops() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            heads = [each.view(2, 5, 4, 4).transpose(1, 2) for each in (q, k)]
            return heads[0] @ heads[1].transpose(-1, -2)

    example = (torch.randn(2, 5, 16), torch.randn(2, 5, 16))
    exported = torch.export.export(Attention(), example).run_decompositions()
    before = len(exported.graph.nodes)
    keep_merged_axes(exported)
    assert len(exported.graph.nodes) == before
