"""Inputs and outputs that targets do not have as such: all of them in one program per target."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import LoweringError, VerificationError

SUFFIXES = {"coreai": ".aimodel", "coreml": ".mlpackage", "executorch": ".pte"}
TARGETS = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in SUFFIXES]


class Interfaces(nn.Module):
    """Takes tensors without dimensions, numbers and None; gives what it was given, twice, and more."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("held", torch.randn(2, 6))

    def forward(
        self, x: Tensor, scale: Tensor, flag: Tensor, given: dict[str, Any], times: int, empty: None
    ) -> dict[str, Any]:
        y = self.layer(x) * scale * times + given["class"] - given["a.b"][0].float()
        y = torch.where(flag, y, -y)
        return {
            "y": y,
            "again": [y, y],
            "mean": y.mean(),
            "largest": y.argmax(-1)[0],
            "any": (y > 0).any(),
            "positive": y > 0,
            "input": x,
            "view": given["class"].view(-1),
            "weight": self.layer.weight,
            "held": self.held,
            "none": empty,
            "times": times,
        }


@pytest.mark.integration
@pytest.mark.parametrize("target", TARGETS)
def test_every_kind_of_input_and_output_comes_out_right(target: str, tmp_path: Path) -> None:
    x = torch.randn(6, 2).t()  # not contiguous
    small = torch.randint(0, 200, (2, 6), dtype=torch.uint8)
    given = {"class": torch.randn(2, 6), "a.b": (small,)}
    args = (x, torch.tensor(0.5), torch.tensor(True), given, 3, None)
    options = {"precision": "float32"} if target == "coreml" else {}
    program = graphopt.capture(Interfaces().eval(), args)
    artifact = graphopt.lower(program, target, **options)
    artifact.save(tmp_path / f"m{SUFFIXES[target]}")
    for flag, times in ((True, 0.5), (False, -2.0)):
        outcome = artifact.verify(x, torch.tensor(times), torch.tensor(flag), given, 3, None)
        assert len(outcome.outputs) == 11
        assert max(outcome.outputs) < 1e-5


@pytest.mark.integration
@pytest.mark.parametrize("target", TARGETS[:2])
def test_outputs_have_the_names_of_the_mapping_that_is_returned(
    target: str, tmp_path: Path
) -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"logits": x * 3, "class": x + 1, "x": x - 1, "a b": [x * 2, None, x * 5]}

    artifact: Any = graphopt.lower(Named(), target, torch.randn(2, 3))
    artifact.save(tmp_path / f"m{SUFFIXES[target]}")
    names = ["logits", "out_class", "x_out", "a_b_0", "a_b_2"]
    if target == "coreml":
        assert [output.name for output in artifact.model.get_spec().description.output] == names
    else:
        assert output_names_of(artifact.path) == names
    assert artifact.verification.max_error < 2e-3


def output_names_of(path: Path) -> list[str]:
    from coreai.authoring import AIModelAsset

    async def read() -> list[str]:
        async with AIModelAsset.load(path).executable() as model:
            return list(model.load_function("main").desc.output_names)

    return asyncio.run(read())


@pytest.mark.integration
@pytest.mark.coreml
def test_numbers_and_scalars_are_taken_in_float16_too(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, times: int, scale: Tensor, empty: None, y: Tensor) -> Tensor:
            return x * times * scale + y

    args = (torch.randn(2, 6), 3, torch.tensor(0.5), None, torch.randn(2, 6))
    artifact = graphopt.lower(Scaled(), "coreml", args)
    artifact.save(tmp_path / "m.mlpackage")
    assert artifact.verify(*args).max_error < 2e-3


@pytest.mark.coreai
def test_a_program_without_tensors_among_its_outputs_is_refused() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> int:
            return x.shape[0]

    program = graphopt.capture(Nothing(), (torch.randn(2, 3),), dynamic_shapes=None)
    with pytest.raises(LoweringError, match="no tensor"):
        graphopt.lower(program, "coreai")


@pytest.mark.coreai
def test_integers_that_the_type_there_does_not_hold_are_refused(tmp_path: Path) -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    artifact = graphopt.lower(Doubled(), "coreai", torch.tensor([1, 2]))
    artifact.save(tmp_path / "m.aimodel")
    with pytest.raises(VerificationError, match=r"'x' holds values that int32"):
        artifact.verify(torch.tensor([2**40, 1]))
