"""Every pass is exported and named in a test of passes; where other passes may stand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from graphopt import passes
from graphopt.passes.pass_base import Pass

ROOT = Path(__file__).parents[2]
EXPORTED = [
    name
    for name in passes.__all__
    if isinstance(getattr(passes, name), type) and issubclass(getattr(passes, name), Pass)
]
# folder → why passes stand there
ELSEWHERE = {
    "backends": "forms of targets",
    "graphopt/interop": "annotations of another library",
    "graphopt/search": "wraps a search",
}


def passes_in(folder: str) -> dict[str, Path]:
    """Public classes derived from `Pass` below a folder, by name."""
    return {
        node.name: path
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and "Pass" in {ast.unparse(base) for base in node.bases}
        and not node.name.startswith("_")
    }


@pytest.mark.parametrize("name", EXPORTED)
def test_pass_is_named_in_a_test(name: str) -> None:
    texts = (path.read_text() for path in (ROOT / "tests" / "passes").glob("test_*.py"))
    assert any(re.search(rf"\b{name}\(", text) for text in texts)


def test_every_pass_of_the_folder_is_exported() -> None:
    assert passes_in("passes").keys() <= set(EXPORTED)


def test_passes_stand_in_their_folder_or_with_what_they_wrap() -> None:
    places = {path.relative_to(ROOT).as_posix() for path in passes_in("graphopt").values()}
    elsewhere = {place for place in places if not place.startswith(tuple(ELSEWHERE))}
    assert elsewhere == set()
    assert passes_in("backends")
