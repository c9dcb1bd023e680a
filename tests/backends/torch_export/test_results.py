"""Results of torch's own types in a `.pt2`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import graphopt


class Largest(nn.Module):
    def forward(self, x: Tensor) -> dict[str, object]:
        return {"best": x.topk(2, -1), "more": [x.max(-1), x.shape[0]]}


def test_named_results_are_saved_as_tuples(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    program = graphopt.capture(Largest().eval(), (x,))
    assert type(program.module()(x)["best"]) is torch.return_types.topk
    path = graphopt.lower(program, "torch").save(tmp_path / "m.pt2")
    result = torch.export.load(path).module()(x)
    assert type(result["best"]) is tuple
    for value, expected in zip(result["best"], x.topk(2, -1), strict=True):
        assert torch.equal(value, expected)
    assert torch.equal(result["more"][0][1], x.argmax(-1))
    assert result["more"][1] == 4
