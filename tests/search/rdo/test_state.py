"""Blocks that are sealed and say something else are computed again."""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.run.record_file import sealed
from graphopt.search.rdo.state import RunState


def block(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    payload = content.getvalue()
    return sealed({"sha256": hashlib.sha256(payload).hexdigest()}, "key") + b"\n" + payload


@pytest.mark.parametrize(
    "content",
    [
        b"",
        sealed({"sha": 3}, "key") + b"\n",
        sealed({"sha256": hashlib.sha256(b"x").hexdigest()}, "key") + b"\nx",
        block([1]),
        block({"number": 0, "layers": {"a": {"stored": 3}}, "rounded": None}),
        block({"number": 0, "layers": [], "rounded": None}),
        block({"number": 0, "layers": {}, "rounded": {"unknown": 1}}),
    ],
)
def test_a_block_that_says_something_else_is_computed_again(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    state = RunState(tmp_path / "run", "key", resume=True)
    (tmp_path / "run" / "block0.pt").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert state.blocks() == {}
    assert "computed again" in caplog.text
