"""Norms of groups of samples whose number is open."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.backends.decompositions.normalization import group_norm

TARGETS = ("coreai", "coreml", "executorch", "onnx")


class Rows(nn.Module):
    """Each position of a sequence by itself, as retentive networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def test_arithmetic_gives_what_the_norm_gives() -> None:
    norm = nn.GroupNorm(4, 8)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 8, 5, 6)
    assert group_norm(x, 4, norm.weight, norm.bias) is NotImplemented
    program = graphopt.capture(norm.eval(), (x,), dynamic_shapes=({0: Dim("samples", max=9)},))
    rule = {torch.ops.aten.group_norm.default: group_norm}
    decomposed = program.export(dynamic=True).run_decompositions(rule)
    assert not any("group_norm" in str(node.target) for node in decomposed.graph.nodes)
    more = torch.randn(7, 8, 5, 6)
    torch.testing.assert_close(decomposed.module()(more), norm(more), rtol=1e-5, atol=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize(
    "target", [pytest.param(t, marks=getattr(pytest.mark, t)) for t in TARGETS]
)
@pytest.mark.parametrize("places", [(0,), (1,)], ids=["samples", "positions"])
def test_open_samples_are_saved_and_right(
    target: str, places: tuple[int, ...], tmp_path: Path
) -> None:
    x = torch.randn(2, 5, 32)
    sizes = {place: Dim(f"size_{place}", max=16) for place in places}
    program = graphopt.capture(Rows().eval(), (x,), dynamic_shapes=(sizes,))
    options = {"precision": "float32"} if target in ("coreai", "coreml") else {}
    artifact = graphopt.lower(program, target, shapes="open", **options)
    artifact.save(tmp_path / f"net{artifact.suffix}")
    assert artifact.verification.max_error < 1e-5
