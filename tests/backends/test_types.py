"""Models in other float types than float32 on every target: right, or refused with what to do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiers import cases
from torch import Tensor, nn

import graphopt
from graphopt.errors import LoweringError
from graphopt.specs.dtypes import dtype_name

INT4 = {
    "op_state_spec": {"weight": {"dtype": "int4"}},
    "op_input_spec": None,
    "op_output_spec": None,
}
CONFIGS: dict[str, Any] = {
    "tables": {"palettization": {}},
    "W8A8": {"quantization": {}},
    "int4": {"quantization": {"global_config": INT4}},
}
TYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
TARGETS = ("coreai", "coreml", "executorch", "onnx", "torch")
# what a target has no form of: type, config, target → what the refusal says
NO_FORM: dict[tuple[str, str, str], str] = {
    ("half", "W8A8", "executorch"): r"conv: 8-bit activations beside float16.*model\.float\(\)",
    ("bfloat16", "W8A8", "executorch"): r"conv: 8-bit .* beside bfloat16.*model\.float\(\)",
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.batch, self.norm = nn.BatchNorm2d(8), nn.LayerNorm(36)
        self.fc = nn.Linear(36, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.batch(torch.sigmoid(self.conv(x)))).flatten(2)
        return self.fc(self.norm(y))


def by_default(kind: str, config: str, target: str) -> bool:
    return (kind, config, target) in (
        ("half", "tables", "coreai"),
        ("bfloat16", "int4", "coreml"),
        ("double", "W8A8", "torch"),
    )


@pytest.mark.parametrize(
    ("kind", "config", "target"), cases(TYPES, CONFIGS, TARGETS, default=by_default)
)
def test_other_float_types_are_right_or_refused_with_the_way_out(
    kind: str, config: str, target: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8).to(TYPES[kind])
    model = Net().to(TYPES[kind]).eval()
    program = graphopt.compress(model, (x,), CONFIGS[config], calibration_data=[x])
    refusal = NO_FORM.get((kind, config, target))
    if refusal is not None:
        with pytest.raises(LoweringError, match=f"(?s){refusal}"):
            graphopt.lower(program, target)
        return
    with caplog.at_level(logging.WARNING, "graphopt"):
        artifact = graphopt.lower(program, target)
        artifact.save(tmp_path / f"net{artifact.suffix}")
    assert artifact.verification is not None
    assert artifact.verification.complete
    lacking = {
        "double": ("coreai", "coreml", "onnx"),
        "bfloat16": ("coreml", "onnx", *(["coreai"] if config == "tables" else [])),
    }
    said = f"{dtype_name(TYPES[kind])} is cast to float32"
    assert (said in caplog.text) == (target in lacking.get(kind, ()))


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("coreml", "onnx")]
)
def test_values_in_bfloat16_inside_a_model_are_wider_and_right(target: str, tmp_path: Path) -> None:
    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.bfloat16() * 3).float()

    artifact = graphopt.lower(Inside(), target, (torch.randn(4, 8),))
    artifact.save(tmp_path / f"net{artifact.suffix}")
    assert artifact.verification.holds


class Mixed(nn.Module):
    """Integers, truth values and floats side by side, and as the sides of an angle."""

    def forward(self, i: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        above = x > 0
        return (
            torch.cat([i, x, above], -1),
            torch.stack([i, x]),
            torch.hstack([above, i]),
            torch.atan2(i, x),
            torch.atan2(x, i),
            (i.abs() + 1) ** x,
        )


@pytest.mark.integration
@pytest.mark.parametrize("target", TARGETS)
def test_operands_of_several_types_have_the_type_of_the_result(target: str, tmp_path: Path) -> None:
    i = torch.tensor([[0, -1, 2], [3, 0, -2]], dtype=torch.int32)
    x = torch.tensor([[-1.0, 0.0, 0.5], [-0.7, 2.0, -3.0]])
    precision: dict[str, Any] = {"precision": "float32"} if target == "coreml" else {}
    artifact: Any = graphopt.lower(graphopt.capture(Mixed(), (i, x)), target, **precision)
    artifact.save(tmp_path / f"net{artifact.suffix}")
    assert artifact.verification.max_error < 1e-6


class _Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.first(x)
        return self.second(torch.relu(y.float()))


def test_a_refusal_of_autocast_names_the_layer_and_the_way_out() -> None:
    x = torch.randn(4, 32)
    program = graphopt.compress(_Mixed().eval(), x, CONFIGS["W8A8"], calibration_data=[x])
    with pytest.raises(LoweringError, match=r"first: .* without torch\.autocast inside") as refused:
        graphopt.lower(program, "executorch")
    assert "assert" not in str(refused.value)
