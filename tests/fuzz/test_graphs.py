"""Random networks through every target: the artifact computes what the program does, or is refused."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fuzzing import budget, counted, remembered
from helpers.random_nets import TABLES, Plan, RandomNet, compression, nets
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import graphopt
from graphopt.errors import GraphOptError, VerificationError
from graphopt.ir.program import Program

TARGETS = {
    "torch": (".pt2", "torch"),
    "coreai": (".aimodel", "coreai_torch"),
    "coreml": (".mlpackage", "coremltools"),
    "executorch": (".pte", "executorch"),
    "onnx": (".onnx", "onnx"),
}
# a long run names the targets that it goes through
CHOSEN = os.environ.get("GRAPHOPT_FUZZ_TARGETS", "torch").split()


# what a target computes with at all; the others are refused by their dtype alone
DTYPES = {
    "coreml": (torch.float32, torch.float16),
    "onnx": (torch.float32, torch.float16),
}
ANY = (torch.float32, torch.float32, torch.float16, torch.bfloat16)


def as_tuple(value: Tensor | tuple[Tensor, ...] | dict[str, Tensor]) -> tuple[Tensor, ...]:
    if isinstance(value, dict):
        return tuple(value.values())
    return value if isinstance(value, tuple) else (value,)


def run(module: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return as_tuple(module(x))


def near(one: Tensor, other: Tensor, exact: Tensor) -> bool:
    """Whether a value is the model's own, but for rounding: in 16 bits its own error says how much that is."""
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[other.dtype]
    scale = float(other.abs().max()) if other.numel() else 0.0
    allowed = tolerance * max(scale, 1e-6)
    if other.dtype != torch.float32 and other.isfinite().all() and other.numel():
        allowed += 2 * float((other.double() - exact).abs().max())
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.allclose(one.float(), other.float(), rtol=0, atol=allowed, equal_nan=True)
    )


@st.composite
def cases(draw: Any) -> tuple[Plan, str, tuple[str, ...]]:
    """A network, its target, and how it is compressed, in turn."""
    target = draw(st.sampled_from(CHOSEN))
    plan = draw(nets(dtypes=DTYPES.get(target, ANY)))
    more = draw(st.sampled_from([(), ("pruning",), ("joint",), ("int4 blocks",)]))
    return plan, target, (draw(st.sampled_from(TABLES)), "w8a8", *more)


@budget(2)
@given(case=cases())
def test_artifacts_compute_what_their_programs_do(case: tuple[Plan, str, tuple[str, ...]]) -> None:
    plan, target, kinds = case
    remembered(case)
    if importlib.util.find_spec(TARGETS[target][1]) is None:
        pytest.skip(f"{TARGETS[target][1]} is not installed")
    torch.manual_seed(plan.seed)
    model = RandomNet(plan).eval()
    x = torch.randn(plan.batch, plan.length, plan.width).to(plan.dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted, exact = run(model, x), run(copy.deepcopy(model).double(), x.double())
    with counted(f"graph {target}"):
        with counted(f"capture {str(plan.dtype)[6:]}"):
            captured = graphopt.capture(model, (x,))
            found = run(captured.module(), x)
            assert all(map(near, found, wanted, exact)), "capture: something else"
            larger = torch.cat([x, x.flip(0) * 0.5])
            with contextlib.suppress(GraphOptError):
                # of another batch it computes the same, or says that it does not
                of_larger = run(captured.module(), larger)
                exact = run(copy.deepcopy(model).double(), larger.double())
                wanted_larger = run(model, larger)
                assert all(map(near, of_larger, wanted_larger, exact)), "capture: of a larger batch"
        for kind in kinds:
            with contextlib.suppress(GraphOptError), counted(f"graph {target} {kind}"):
                saved(captured, kind, target, x)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(map(torch.equal, run(model, x), wanted))


def saved(captured: Program, kind: str, target: str, x: Tensor) -> None:
    program = graphopt.compress(
        captured,
        None,
        compression(kind),
        calibration_data=[x],
        backend=target,
        on_unmatched="warn",
        on_unobserved="skip",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"m{TARGETS[target][0]}"
        try:
            program.save(path)
        except VerificationError:
            # refused rather than wrong, and yet to be looked at
            with counted(f"lapse {target} {kind}"):
                raise
        if target == "torch":
            again = run(graphopt.capture(path).module(), x)
            assert all(map(equal, again, run(program.module(), x))), "the file: something else"


def equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())
