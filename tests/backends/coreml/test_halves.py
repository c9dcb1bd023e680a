"""Programs in float16: right in Core ML, with inputs, outputs and files of their own types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.together import together
from torch import Tensor, nn

import graphopt

pytestmark = [pytest.mark.coreml, pytest.mark.integration]


class Call(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x)  # type: ignore[no-any-return]


def half(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0)).half()


IMAGE = half(2, 8, 4, 4)
CASES: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "a norm of groups": (nn.GroupNorm(2, 8), (IMAGE,)),
    "deviations": (
        Call(lambda x: x / x.std(-1, keepdim=True) + x.var(-1)[..., None]),
        (half(2, 4),),
    ),
    "a learned slope": (nn.PReLU(8), (IMAGE,)),
    "samples of a grid": (Call(F.grid_sample), (IMAGE, half(2, 4, 4, 2).clamp(-0.9, 0.9))),
    "a mask of floats": (
        Call(lambda q, m: F.scaled_dot_product_attention(q, q, q, m)),
        (half(16, 2, 16, 8), half(1, 2, 16, 16)),
    ),
    "a part in float32": (Call(lambda x: (x.float().square().mean(-1) + 1).half()), (half(2, 4),)),
    "whole numbers": (Call(lambda x: x * torch.arange(4) + (x > 0)), (half(2, 4),)),
    "layers": (nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (IMAGE,)),
}


def test_ops_whose_constants_the_converter_gives_in_float32_are_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, call = together({name: (net.half(), x) for name, (net, x) in CASES.items()}, CASES)
    artifact = graphopt.lower(model, "coreml", call)
    artifact.save(tmp_path / "net.mlpackage")
    assert artifact.verification.max_error < 3e-3


def test_inputs_outputs_and_weights_stay_in_16_bits(tmp_path: Path) -> None:
    import coremltools as ct

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256)).half().eval()
    path = graphopt.lower(model, "coreml", (half(2, 256),)).save(tmp_path / "net.mlpackage")
    described = ct.models.MLModel(str(path), skip_model_load=True).get_spec().description
    for value in (described.input[0], described.output[0]):
        assert value.type.multiArrayType.dataType == value.type.multiArrayType.FLOAT16
    stored = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    assert stored < 1.2 * 2 * 256 * 256
