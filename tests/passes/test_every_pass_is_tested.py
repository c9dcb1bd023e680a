"""Every exported pass is named in a test of passes or of what runs them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graphopt import passes
from graphopt.passes.pass_base import Pass

TESTS = Path(__file__).parent.parent
FOLDERS = ("passes", "compressors", "analysis", "backends", "interop")
EXPORTED = [
    name
    for name in passes.__all__
    if isinstance(getattr(passes, name), type) and issubclass(getattr(passes, name), Pass)
]


@pytest.mark.parametrize("name", EXPORTED)
def test_pass_is_named_in_a_test(name: str) -> None:
    texts = (path.read_text() for folder in FOLDERS for path in (TESTS / folder).rglob("test_*.py"))
    assert any(re.search(rf"\b{name}\(", text) for text in texts)
