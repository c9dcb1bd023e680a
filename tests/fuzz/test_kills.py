"""Runs that are killed and begun again give what runs give that nobody stops, and leave nothing else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("kills", Path(__file__).with_name("kills.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
kills = importlib.util.module_from_spec(_SPEC)
sys.modules["kills"] = kills
_SPEC.loader.exec_module(kills)


@pytest.mark.slow
@pytest.mark.parametrize("name", kills.CALLS)
def test_twenty_kills_change_no_result_and_leave_nothing(name: str) -> None:
    each = {"analyze": 5, "rdo": 5, "sweep": 4}.get(name, 2)
    assert kills.kill_often(name, each, seed=1)["wrong"] == 0
