"""What Core ML refuses, by deployment target, and checks that are partial."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tables_on_targets import SPECS, palettized
from helpers.tiers import cases

import graphopt
from graphopt.errors import LoweringError
from graphopt.palettization import (
    PalettizationSpec,
)
from graphopt.quantization import QuantizationSpec


@pytest.mark.integration
@pytest.mark.coreml
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("3 bits", r"3-bit indices for iOS16; raise .* use 2 bits"),
        ("groups", "several tables for iOS16"),
        ("vectors", "cluster_dim=2 for iOS16"),
        ("int8 table", "tables of int8 for iOS16"),
        ("channel scale", "per-channel scale for iOS16"),
        ("outliers", "sparse outliers for iOS16"),
    ],
)
def test_older_core_ml_refuses_what_it_cannot_hold(name: str, message: str) -> None:
    program = palettized(SPECS[name]).program()
    with pytest.raises(LoweringError, match=message):
        graphopt.lower(program, "coreml", minimum_deployment_target="iOS16")


@pytest.mark.integration
@pytest.mark.coreml
@pytest.mark.parametrize(
    ("ios", "bits"),
    cases(
        ("iOS16", "iOS17"),
        (1, 2, 4, 6, 8),
        default=lambda ios, bits: (ios, bits) in {("iOS16", 4), ("iOS17", 6)},
    ),
)
def test_older_core_ml_takes_the_packed_form(ios: str, bits: int, tmp_path: Path) -> None:
    program = palettized(PalettizationSpec(n_bits=bits)).program()
    artifact = graphopt.lower(program, "coreml", minimum_deployment_target=ios, precision="float32")
    artifact.save(tmp_path / "net.mlpackage")
    outcome = artifact.verification
    assert outcome.max_error < 1e-6
    assert outcome.weights == 5


@pytest.mark.coreml
def test_core_ml_refuses_fp8_tables_and_names_layer_feature_and_way_out() -> None:
    spec = PalettizationSpec(lut_qspec=QuantizationSpec(dtype=torch.float8_e4m3fn))
    palettizer = palettized(spec)
    with pytest.raises(LoweringError, match=r"fc.weight: tables of fp8_e4m3; use one of .*int8"):
        palettizer.finalize(backend="coreml")


@pytest.mark.integration
@pytest.mark.coreml
def test_op_that_cannot_be_evaluated_is_named_and_the_check_is_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.backends.coreml import evaluate, mil_ops

    artifact = graphopt.lower(palettized(PalettizationSpec()).program(), "coreml")
    artifact.save(tmp_path / "net.mlpackage")
    known = {name: rule for name, rule in mil_ops.OPS.items() if name != "conv"}
    monkeypatch.setattr(evaluate, "OPS", known)
    outcome = artifact.verify()
    assert not outcome.complete
    assert outcome.notes == ("no rule for MIL op conv",)
    assert outcome.weights == 5
