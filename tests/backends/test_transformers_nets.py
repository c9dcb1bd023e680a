"""Whole networks of transformers, compressed, on every target: right, or refused as uncompressed."""

from __future__ import annotations

import pytest
from helpers.op_sweep import check_share
from helpers.tiers import cases
from helpers.transformers_nets import FORMS, NETS, try_net

# share of the networks and forms that come out right, at least
SHARES = {"coreai": 0.9, "coreml": 0.8, "executorch": 0.9, "torch": 0.9}
TARGETS = [
    pytest.param(name, marks=[getattr(pytest.mark, name)] if name != "torch" else [])
    for name in SHARES
]
FEW = {"bert": "tables", "llama": "W8A8", "whisper": "int4 blocks", "mobilenet_v2": "W8A8"}


def in_seconds(name: str, target: str) -> bool:
    """Whether it does not take as long as all the others together."""
    return (name, target) != ("whisper", "executorch")


@pytest.mark.integration
@pytest.mark.parametrize(("name", "target"), cases(FEW, SHARES, default=in_seconds))
def test_a_network_is_right(name: str, target: str) -> None:
    outcome = try_net(name, FEW[name], target)
    assert outcome.kind == "right", outcome.said


@pytest.mark.slow  # some seconds a network and form
@pytest.mark.parametrize("target", TARGETS)
def test_every_network_is_right_or_refused_as_it_is_uncompressed(target: str) -> None:
    check_share([try_net(name, form, target) for name in NETS for form in FORMS], SHARES[target])
