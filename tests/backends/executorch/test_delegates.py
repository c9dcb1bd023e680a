"""Delegates of .pte files: each payload is unpacked and evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.executorch_nets import IDS, IMAGE, SPECS, Convolutions, Words, palettized, saved
from helpers.tiers import cases, some
from torch import Tensor, nn

import graphopt
from graphopt import pipelines
from graphopt.errors import LoweringError
from graphopt.quantization import Quantizer, QuantizerConfig

pytestmark = pytest.mark.executorch


HELD = {
    *(("coreml", "vectors in groups"), ("coreai", "channel scale")),
}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("delegate", "name"), cases(("coreml", "coreai"), SPECS, default=lambda *case: case in HELD)
)
def test_targets_delegates_hold_every_form(name: str, delegate: str, tmp_path: Path) -> None:
    pytest.importorskip("coremltools" if delegate == "coreml" else "coreai_torch")
    program = palettized(Convolutions(), IMAGE, SPECS[name])
    artifact = saved(program, tmp_path, delegate=delegate, precision="float32")
    outcome = artifact.verification
    assert outcome.max_error < 1e-6
    assert f"evaluated its {delegate} part" in outcome.how
    assert artifact.delegation.delegates == 1
    assert not artifact.delegation.outside
    dense = sum(4 * p.numel() for p in Convolutions().parameters())
    assert artifact.size < dense if name != "8 bits" else True


@pytest.mark.integration
@pytest.mark.parametrize("delegate", ["coreml", "coreai"])
def test_targets_delegates_take_words_and_two_outputs(delegate: str, tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Words()

        def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            inside = self.inner.words(ids)
            return self.inner.head(inside) + x, inside

    pytest.importorskip("coremltools" if delegate == "coreml" else "coreai_torch")
    program = pipelines.palettize().run(Both().eval(), (IDS, torch.randn(16)))
    artifact = saved(program, tmp_path, delegate=delegate, precision="float32")
    outcome = artifact.verification
    assert len(outcome.outputs) == 2
    assert outcome.max_error < 1e-6


@pytest.mark.integration
@pytest.mark.parametrize(
    "delegate", some(["portable", "coreml", "coreai"], lambda name: name == "coreai")
)
def test_quantized_activations_go_through_every_delegate(delegate: str, tmp_path: Path) -> None:
    if delegate != "portable":
        pytest.importorskip("coremltools" if delegate == "coreml" else "coreai_torch")
    quantizer = Quantizer(Convolutions().eval(), QuantizerConfig())
    quantizer.prepare((IMAGE,))
    quantizer.calibrate([IMAGE])
    options = {} if delegate == "portable" else {"precision": "float32"}
    artifact = saved(quantizer.program(), tmp_path, delegate=delegate, **options)
    assert artifact.verification.max_error < 1e-6


@pytest.mark.integration
def test_tables_and_activations_go_through_the_core_ml_delegate(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    program = graphopt.compress(
        Convolutions().eval(),
        (IMAGE,),
        {"palettization": {}, "quantization": {}},
        calibration_data=[IMAGE],
    )
    artifact = saved(program, tmp_path, delegate="coreml")
    outcome = artifact.verification
    assert outcome.max_error < 0.01
    assert outcome.weights == 3


@pytest.mark.integration
def test_weight_that_two_ops_read_stays_a_table_for_each(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(128, 128)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.fc(x)))

    program = palettized(Twice(), torch.randn(1, 128), SPECS["4 bits"])
    artifact = saved(program, tmp_path, delegate="coreml", precision="float32")
    assert artifact.verification.max_error < 1e-6
    assert artifact.size < 30_000  # the dense weight would be 65,536


@pytest.mark.integration
def test_fp16_of_a_delegate_is_its_targets(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    program = palettized(Convolutions(), IMAGE, SPECS["4 bits"])
    half = saved(program, tmp_path, delegate="coreml")
    assert 1e-6 < half.verification.max_error < 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delegate": "vulkan"}, "delegate must be one of"),
        ({"tables": "packed"}, "tables must be one of"),
        ({"precision": "float16"}, "no option .'precision'. for xnnpack"),
        ({"delegate": "coreai", "minimum_deployment_target": "iOS18"}, "'coreai'"),
        ({"delegate": "coreml", "minimum_deployment_target": "iOS9"}, "minimum_deployment_target"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    pytest.importorskip("coremltools")
    program = palettized(Words(), IDS, SPECS["4 bits"])
    with pytest.raises(LoweringError, match=message):
        graphopt.lower(program, "executorch", **options)


def test_core_ml_of_an_older_system_refuses_what_it_cannot_hold() -> None:
    pytest.importorskip("coremltools")
    program = palettized(Words(), IDS, SPECS["groups of rows"])
    with pytest.raises(LoweringError, match=r"several tables for iOS17"):
        graphopt.lower(program, "executorch", delegate="coreml", minimum_deployment_target="iOS17")
