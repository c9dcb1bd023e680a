"""Random networks through every target: the artifact computes what the program does, or is refused."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
import torch
from helpers.fuzzing import budget, counted
from helpers.random_nets import COMPRESSIONS, Plan, RandomNet, compression, nets
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import graphopt
from graphopt.errors import VerificationError

TARGETS = {
    "torch": (".pt2", "torch"),
    "coreai": (".aimodel", "coreai_torch"),
    "coreml": (".mlpackage", "coremltools"),
    "executorch": (".pte", "executorch"),
    "onnx": (".onnx", "onnx"),
}
# a long run names the targets that it goes through
CHOSEN = os.environ.get("GRAPHOPT_FUZZ_TARGETS", "torch").split()


def as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def near(one: Tensor, other: Tensor) -> bool:
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[other.dtype]
    scale = float(other.abs().max()) if other.numel() else 0.0
    return torch.allclose(one.float(), other.float(), rtol=0, atol=tolerance * max(scale, 1e-6))


@budget(3)
@given(plan=nets(), kind=st.sampled_from(COMPRESSIONS), target=st.sampled_from(CHOSEN))
def test_artifacts_compute_what_their_programs_do(plan: Plan, kind: str, target: str) -> None:
    suffix, package = TARGETS[target]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    torch.manual_seed(plan.seed)
    model = RandomNet(plan).eval()
    x = torch.randn(plan.batch, plan.length, plan.width).to(plan.dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        wanted = as_tuple(model(x))
    with counted(f"graph {target} {kind}"):
        captured = graphopt.capture(model, (x,))
        with torch.no_grad():
            got = as_tuple(captured.module()(x))
        assert all(map(near, got, wanted)), "capture computes something else"
        options = {"on_unmatched": "warn", "on_unobserved": "skip"}
        program = graphopt.compress(
            captured, None, compression(kind), calibration_data=[x], backend=target, **options
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"m{suffix}"
            try:
                program.save(path)
            except VerificationError:
                # refused rather than wrong, and yet to be looked at
                with counted(f"lapse {target} {kind}"):
                    raise
            if target == "torch":
                with torch.no_grad():
                    again = as_tuple(graphopt.capture(path).module()(x))
                    own = as_tuple(program.module()(x))
                assert all(map(torch.equal, again, own)), "the file computes something else"
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with torch.no_grad():
        assert all(map(torch.equal, as_tuple(model(x)), wanted))
