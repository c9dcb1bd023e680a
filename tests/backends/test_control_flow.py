"""Programs that choose between two bodies while they run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import LoweringError
from graphopt.palettization import KMeansPalettizerConfig

SUFFIXES = {"coreai": ".aimodel", "executorch": ".pte", "onnx": ".onnx", "torch": ".pt2"}


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return torch.cond(y.sum() > 0, self.second, lambda z: 2 - z, (y,))  # type: ignore[no-any-return]


# one of these takes the first body, the other the second
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def test_the_data_take_both_bodies() -> None:
    first = Conditional().first
    assert {bool(first(x).sum() > 0) for x in (X, -X)} == {True, False}


@pytest.mark.integration
@pytest.mark.parametrize(
    "target",
    [pytest.param(n, marks=[] if n == "torch" else getattr(pytest.mark, n)) for n in SUFFIXES],
)
def test_both_bodies_are_right(target: str, tmp_path: Path) -> None:
    program = graphopt.compress(Conditional().eval(), (X,), KMeansPalettizerConfig.presets.w4())
    artifact = graphopt.lower(program, target)
    calls = [(X,), (-X,)]
    artifact.save(tmp_path / f"m{SUFFIXES[target]}", verify=calls)
    assert artifact.verification.calls == 2
    assert artifact.verification.holds


@pytest.mark.coreml
def test_core_ml_names_what_it_has_not() -> None:
    program = graphopt.capture(Conditional().eval(), (X,))
    with pytest.raises(LoweringError, match="cond in the model"):
        graphopt.lower(program, "coreml")
