"""State comes in as `past_` and goes out as `present_`, call by call as in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt

pytestmark = [pytest.mark.onnx, pytest.mark.integration]


class Cache(nn.Module):
    """Attends to what earlier calls wrote, counts them, keeps a running mean, and a row that it never reads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.register_buffer("rows", torch.zeros(8, 16))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("mean", torch.full((16,), 0.5))
        self.register_buffer("last", torch.zeros(16))
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.last.copy_(x[0])
        self.mean.mul_(0.9).add_(x.mean(0) * 0.1)
        self.inner.rows.index_copy_(0, self.place, self.fc(x - self.mean)[:1])
        self.place.add_(1)
        weights = torch.softmax(x @ self.inner.rows.mT, -1)
        return weights @ self.inner.rows, self.mean


DATA = list(torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_sequence_of_calls_is_that_of_the_module(compressed: bool, tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    model = Cache().eval()
    program: Any = graphopt.capture(model, (DATA[0],))
    if compressed:
        program = graphopt.compress(model, (DATA[0],), {"palettization": {}}, progress=False)
    artifact: Any = graphopt.lower(program, "onnx")
    path = artifact.save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(path)
    inputs = [place.name for place in session.get_inputs()]
    outputs = [place.name for place in session.get_outputs()]
    names = ["inner.rows", "place", "mean", "last"]
    assert sorted(inputs[1:]) == sorted(f"past_{name}" for name in names)
    assert sorted(outputs[2:]) == sorted(f"present_{name}" for name in names)
    state = {name: value.numpy() for name, value in artifact.initial_state.items()}
    assert set(state) == set(inputs[1:])
    wanted = program.module()
    for x in DATA:
        found = session.run(None, {inputs[0]: x.numpy(), **state})
        for value, want in zip(found, wanted(x), strict=False):
            torch.testing.assert_close(torch.from_numpy(value), want, rtol=0, atol=1e-5)
        fresh = dict(zip(outputs, found, strict=True))
        state = {name: fresh[name.replace("past_", "present_", 1)] for name in inputs[1:]}
    assert int(state["past_place"][0]) == len(DATA)


def test_saving_leaves_the_state_of_the_module_as_it_was(tmp_path: Path) -> None:
    model = Cache().eval()
    artifact = graphopt.lower(model, "onnx", DATA[0])
    for name in ("a", "b"):
        artifact.save(tmp_path / f"{name}.onnx")
    assert int(model.place[0]) == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
