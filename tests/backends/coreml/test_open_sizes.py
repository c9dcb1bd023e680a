"""Open sizes on Core ML: numbers that depend on them, and one conversion behind another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.state_nets import noise
from torch import Tensor, nn

import graphopt
from graphopt.errors import LoweringError

pytestmark = [pytest.mark.coreml, pytest.mark.integration]
quantized = torch.ops.quantized_decomposed


class Places(nn.Module):
    """Places of the columns as floats, rounded to steps of a half."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], dtype=x.dtype)
        stored = quantized.quantize_per_tensor(places, 0.5, 0, -128, 127, torch.int8)
        return (
            self.fc(x)
            + quantized.dequantize_per_tensor(stored, 0.5, 0, -128, 127, torch.int8)[:, None]
        )


def test_places_of_open_number_are_floats_also_after_a_conversion_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import coremltools as ct

    program = graphopt.capture(Places().eval(), noise(2, 6, 4))
    shapes = {"x": {1: (2, 9)}}
    with monkeypatch.context() as patch:
        patch.setattr(ct, "convert", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(LoweringError, match="division by zero"):
            graphopt.lower(program, "coreml", precision="float32", shapes=shapes)
    artifact = graphopt.lower(program, "coreml", precision="float32", shapes=shapes)
    artifact.save(tmp_path / "m.mlpackage")
    assert artifact.verification.calls >= 4
    assert artifact.verification.max_error < 1e-5


class Cache(nn.Module):
    """Rows of any number put into a cache, as a prompt's are."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("rows", torch.zeros(1, 2, 16, 4))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return self.rows.index_copy_(2, position, self.fc(x)) + 0


def test_rows_of_open_number_are_put_into_a_cache(tmp_path: Path) -> None:
    program = graphopt.capture(Cache().eval(), (noise(1, 2, 5, 4), torch.arange(5)))
    shapes = {"x": {2: (2, 9)}}
    artifact = graphopt.lower(program, "coreml", precision="float32", shapes=shapes)
    artifact.save(tmp_path / "m.mlpackage")
    places = ((9, 0), (3, 9), (2, 12))
    calls = [(noise(1, 2, n, 4, seed=n), torch.arange(start, start + n)) for n, start in places]
    found = artifact.verify(calls=calls)
    assert found.holds
    assert found.calls == 3
