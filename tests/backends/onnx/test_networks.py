"""Networks and torch's ops in ONNX Runtime: right, or refused as they are uncompressed."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.op_calls import counted_ops
from helpers.op_sweep import check_share, sweep, write_table
from helpers.tiers import cases
from helpers.transformers_nets import FORMS, NETS, try_net

pytestmark = pytest.mark.onnx
SHARE = 0.9
FEW = {("bert", "W8A8")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"), cases(NETS, FORMS, default=lambda name, form: (name, form) in FEW)
)
def test_a_network_is_right(name: str, form: str) -> None:
    outcome = try_net(name, form, "onnx")
    assert outcome.kind in ("right", "refused"), outcome.said


@pytest.mark.slow
def test_nine_networks_of_ten_are_right() -> None:
    check_share([try_net(name, form, "onnx") for name in NETS for form in FORMS], SHARE)


@pytest.mark.slow
def test_every_op_is_right_or_refused() -> None:
    outcomes = sweep("onnx", counted_ops())
    write_table(outcomes, Path(__file__).parents[3] / "out/ops/onnx.csv")
    check_share(outcomes, SHARE)
