"""The whole pipeline on targets and on models of many shapes."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from search.mixed_precision.nets import encoder, pictures, residual, sentences
from search.rdo.nets import calibration, held_out, trained
from search.rdo.runs import EXAMPLE, QUICK, run
from torch import Tensor, nn

import graphopt
from graphopt.analysis.stored_values import find_quantized_weights
from graphopt.errors import (
    LoweringError,
)
from graphopt.rdo import RDOConfig, Session, optimize

pytestmark = pytest.mark.usefixtures("one_thread")


# --- targets --------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "mark"),
    [("aimodel", "coreai"), ("mlpackage", "coreml"), ("pte", "executorch"), ("pt2", "")],
)
def test_odd_widths_run_on_every_target(suffix: str, mark: str, tmp_path: Path) -> None:
    if mark:
        pytest.importorskip({"coreai": "coreai_torch", "coreml": "coremltools"}.get(mark, mark))
    program = odd_widths()
    stored = {weight.storage for weight in find_quantized_weights(program.graph_module)}
    assert {"int3", "int6"} <= stored
    target = {"aimodel": "coreai", "mlpackage": "coreml", "pte": "executorch", "pt2": "torch"}
    options = {"precision": "float32"} if mark in ("coreai", "coreml") else {}
    artifact = graphopt.lower(program, target[suffix], **options)
    artifact.save(tmp_path / f"net.{suffix}")
    assert artifact.verification.max_error < 1e-5


@cache
def odd_widths() -> graphopt.CompressedProgram:
    config = {
        "target_bits": 8,
        "layer_candidates": {"stem.weight": ["int6"], "conv1.weight": ["int3"]},
        "rounding": {"blocks": "none"},
    }
    return run(config).program


@pytest.mark.integration
def test_sizes_of_a_target_count_its_padding() -> None:
    config = {"target_bits": 4.4, "candidates": [3, 4], "rounding": {"blocks": "none"}}
    own = run(config).report
    padded = run({**config, "target_bits": 5.0, "backend": "coreai"}).report
    assert {layer.candidate for layer in padded.layers} == {"int4"}  # 3 bits save nothing there
    assert own.bits_per_weight <= 4.4


def test_candidates_that_a_target_cannot_hold_are_refused() -> None:
    with pytest.raises(LoweringError, match="fp8"):
        run({"target_bits": 8, "candidates": ["fp8_e4m3"], "backend": "coreml"})


# --- other models ---------------------------------------------------------------------------------
def test_embeddings_tied_weights_and_several_outputs() -> None:
    program, report = optimize(
        encoder(),
        (sentences()[0][:2],),
        sentences(),
        {"target_bits": 6, "metric": "mse", **QUICK, "rounding": {"blocks": "all", "steps": 20}},
        progress=False,
    )
    rows = {layer.name: layer for layer in report.layers}
    assert rows["embedding.weight"].how == "rounded"
    assert "no error feedback" in rows["embedding.weight"].note
    assert report.bits_per_weight <= 6
    assert report["rate-distortion"].agreement is None
    with torch.no_grad():
        for found, exact in zip(
            program.module()(sentences()[0]), encoder()(sentences()[0]), strict=True
        ):
            assert float((found - exact).abs().max()) < 0.2 * float(exact.abs().max())


def test_blocks_two_values_wide_go_through_a_unet() -> None:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
            self.c, self.d = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(12, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            y = self.b(x).relu()
            y = self.c(y).relu()
            return self.d(torch.cat([x, y], 1))

    torch.manual_seed(0)
    model = UNet().eval()
    data = pictures(4)
    counts, found = [], []
    for width in (1, 2):
        config = {
            "target_bits": 6,
            "metric": "mse",
            "blocks": {"width": width},
            **QUICK,
            "rounding": {"blocks": "all", "steps": 30},
        }
        session = Session.open(
            model, (data[0][:2],), data, RDOConfig.from_dict(config), progress=False
        )
        counts.append(len(session.blocks))
        found.append(optimize(model, (data[0][:2],), data, config, progress=False).report)
    assert counts[0] < counts[1]
    for report in found:
        assert report["rate-distortion"].distance < report["uniform 4-bit"].distance


def test_grouped_convolutions_and_unfolded_norms() -> None:
    data = pictures(4)
    for fold in (True, False):
        _, report = optimize(
            residual(),
            (data[0][:2],),
            data,
            {"target_bits": 5, "metric": "mse", "fold_batchnorm": fold, **QUICK},
            progress=False,
        )
        rows = {layer.name: layer for layer in report.layers}
        assert rows["conv1.weight"].how in ("error feedback", "adaptive rounding")
        assert report["rate-distortion"].distance < 0.5 * report["uniform 4-bit"].distance


@pytest.mark.integration
def test_outputs_that_are_no_floats_are_left_out_of_the_loss() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(trained())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.net(x)
            return logits, logits.argmax(1)

    config = {"target_bits": 5.0, **QUICK, "rounding": {"blocks": "all", "steps": 5}}
    program, report = optimize(Labelled().eval(), EXAMPLE, calibration(), config, progress=False)
    x, _ = held_out()
    logits, labels = program.module()(x)
    assert torch.equal(logits.argmax(1), labels)
    assert report["rate-distortion"].distance < 0.2 * report["uniform 4-bit"].distance


@pytest.mark.integration
def test_keyword_inputs_and_exported_programs() -> None:
    data = pictures(2)
    exported = torch.export.export(residual(), (data[0],), strict=False)
    config = {"target_bits": 6, **QUICK, "metric": "mse"}
    by_name = optimize(exported, None, [{"x": x} for x in data], config, progress=False)
    by_place = optimize(exported, None, data, config, progress=False)
    assert by_name.report.bits() == by_place.report.bits()
