"""Networks and torch's ops in ONNX Runtime: right, or refused as they are uncompressed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.op_calls import counted_ops
from helpers.op_sweep import check_share, sweep, write_table
from helpers.transformers_nets import FORMS, NETS, ZOO, try_net

pytestmark = pytest.mark.onnx
SHARE = 0.9


OUT = Path(os.environ.get("OUT", "out"))


@pytest.mark.integration
@pytest.mark.parametrize(("name", "form"), [("bert", "W8A8"), ("zoo edsr", "int4 blocks")])
def test_a_network_is_right(name: str, form: str) -> None:
    outcome = try_net(name, form, "onnx")
    assert outcome.kind == "right", outcome.said


@pytest.mark.slow  # some seconds a network and form
def test_nine_networks_of_ten_are_right() -> None:
    outcomes = [try_net(name, form, "onnx") for name in (*NETS, *ZOO) for form in FORMS]
    write_table(outcomes, OUT / "networks/onnx.csv")
    check_share(outcomes, SHARE)


@pytest.mark.slow
def test_every_op_is_right_or_refused() -> None:
    outcomes = sweep("onnx", counted_ops())
    write_table(outcomes, OUT / "ops/onnx.csv")
    check_share(outcomes, SHARE)
