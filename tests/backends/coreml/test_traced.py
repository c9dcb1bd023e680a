"""Modules finalized for Core ML, traced by torch.jit and converted by coremltools itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.palettization import KMeansPalettizer
from graphopt.quantization import Quantizer, QuantizerConfig

ct = pytest.importorskip("coremltools")
pytestmark = [pytest.mark.coreml, pytest.mark.integration]


def palettized(model: nn.Module, x: Tensor) -> Any:
    palettizer = KMeansPalettizer(model)
    palettizer.prepare((x,))
    return palettizer


def quantized(model: nn.Module, x: Tensor) -> Any:
    quantizer = Quantizer(model, QuantizerConfig.presets.w8a8())
    quantizer.prepare((x,))
    quantizer.calibrate([x])
    return quantizer


@pytest.mark.parametrize("compressed", [palettized, quantized])
def test_traced_modules_convert_and_compute_what_they_compute_here(
    compressed: Callable[[nn.Module, Tensor], Any], tmp_path: Path
) -> None:
    from graphopt.backends.coreml.evaluate import evaluate, load_program

    x = torch.randn(1, 1, 12, 12)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 25, 10)
    )
    finalized = compressed(model.eval(), x).finalize(backend=graphopt.ExportBackend.CoreML)
    package = ct.convert(
        torch.jit.trace(finalized, (x,)),
        inputs=[ct.TensorType(name="x", shape=x.shape)],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    package.save(str(tmp_path / "net.mlpackage"))
    found = evaluate(load_program(tmp_path / "net.mlpackage"), {"x": x.numpy()})
    (output,) = found.outputs.values()
    with torch.no_grad():
        want = finalized(x)
    assert found.constexprs == 2
    torch.testing.assert_close(
        torch.from_numpy(output), want, rtol=0, atol=1e-4 * float(want.abs().max())
    )
