"""What computes with whole numbers and floats computes in float32, and not in halves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.function_nets import Part
from torch import Tensor, nn

import graphopt
from graphopt.backends.promotion import promote_operands

C = math.log(10000)  # which float16 rounds by 6e-5 of it
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda n: n * C,
    "negative product": lambda n: -C * n,
    "sum": lambda n: n + C,
    "difference": lambda n: C - n,
    "quotient": lambda n: n / C,
    "reciprocal": lambda n: C / (n + 1),
    "power": lambda n: (n + 1) ** 0.3,
    "exponential": lambda n: C**n,
    "truth": lambda n: (n > 3) * C,
    "comparison": lambda n: (n > 3.3).float(),
    "masked": lambda n: n.float().masked_fill(n > 3, C),
    "chosen": lambda n: torch.where(n > 3, 1e-7, C),
    "factor of a sum": lambda n: torch.add(n.float(), n, alpha=C),
    "range": lambda n: torch.exp(-C * torch.arange(8) / 8) + n,
    "root": torch.sqrt,
    "sine": torch.sin,
    "sigmoid": lambda n: torch.sigmoid(n - 4),
}


def test_whole_numbers_are_cast_where_floats_are_computed_alone() -> None:
    n = torch.arange(8)
    mixed = Part(lambda n: torch.where(n > 3, n * 2, n) * C)
    program = graphopt.capture(mixed, (n,), dynamic_shapes=None)
    exported = program.export()
    promote_operands(exported)
    casts = [x for x in exported.graph.nodes if "to_copy" in str(x.target)]
    (product,) = [user for cast in casts for user in cast.users]
    assert len(casts) == 1
    assert "mul" in str(product.target)
    assert torch.equal(exported.module()(n), program.graph_module(n))
    again = len(exported.graph.nodes)
    promote_operands(exported)
    assert len(exported.graph.nodes) == again


TARGETS = {"coreai": "aimodel", "coreml": "mlpackage", "executorch": "pte", "onnx": "onnx"}


@pytest.mark.integration
@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in TARGETS]
)
def test_results_have_the_precision_of_float32(target: str, tmp_path: Path) -> None:
    class All(nn.Module):
        def forward(self, n: Tensor) -> list[Tensor]:
            return [function(n) for function in FUNCTIONS.values()]

    options = {"precision": "float32"} if target in ("coreai", "coreml") else {}
    n = torch.arange(8)
    artifact = graphopt.lower(All().eval(), target, (n,), **options)
    artifact.save(tmp_path / f"net.{TARGETS[target]}")
    wrong = {
        name: error
        for name, error in zip(FUNCTIONS, artifact.verification.outputs, strict=True)
        if error > 1e-6
    }
    assert not wrong
