"""Windows, frequencies and indices of triangles are stored where a target has no op for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.constant_factories import store_constant_factories
from graphopt.ir.editor import Editor

TARGETS = {"coreai": ".aimodel", "coreml": ".mlpackage", "executorch": ".pte", "onnx": ".onnx"}


class Windows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        windows = torch.hann_window(16) + torch.hamming_window(16, periodic=False)
        windows = windows + torch.blackman_window(16) + torch.bartlett_window(16)
        windows = windows + torch.kaiser_window(16) + torch.logspace(0, 1, 16)
        rows, columns = torch.tril_indices(4, 4)
        chosen = x.reshape(-1, 4, 4)[:, rows, columns]
        frequencies = torch.fft.rfftfreq(30) + torch.fft.fftfreq(16)
        return torch.cat([x * windows * frequencies, chosen, x + torch.zeros(16)], -1)


def test_only_what_no_target_has_is_stored() -> None:
    x = torch.randn(2, 16)
    gm = graphopt.capture(Windows().eval(), (x,)).graph_module
    expected = gm(x)
    edit = Editor(gm)
    store_constant_factories(edit)
    gm.recompile()
    gm.graph.lint()
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    left = {str(node.target) for node in calls if not node.all_input_nodes}
    assert not {name for name in left if "window" in name or "freq" in name or "tril" in name}
    assert any("zeros" in name for name in left)
    assert torch.equal(gm(x), expected)


@pytest.mark.integration
@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in TARGETS]
)
def test_windows_are_right(target: str, tmp_path: Path) -> None:
    program = graphopt.capture(Windows().eval(), (torch.randn(2, 16),))
    artifact = graphopt.lower(program, target)
    artifact.save(tmp_path / f"m{TARGETS[target]}")
    assert artifact.verification.holds
    assert artifact.verification.complete
