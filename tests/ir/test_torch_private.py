"""Private parts of torch come from one module, which says what is missing and in which version."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from graphopt.errors import MissingDependencyError, UntestedTorchVersionWarning
from graphopt.ir import torch_private
from graphopt.ir.torch_private import TESTED, part_of_torch, warn_of_untested

ROOT = Path(__file__).parent.parent.parent
HOME = (ROOT / "graphopt/ir/torch_private.py").resolve()
# a stable part of every version, and checks that torch documents
ALLOWED = {"torch.utils._pytree", "torch._check"}


def _names(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return {
        name
        for name in found
        if name.startswith("torch.")
        and not name.startswith("torch.ops.")
        and any(part.startswith("_") for part in name.split("."))
    }


def test_private_parts_are_imported_in_one_module() -> None:
    files = [
        path for top in ("graphopt", "passes", "backends") for path in (ROOT / top).rglob("*.py")
    ]
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        if path.resolve() != HOME
        for name in _names(ast.parse(path.read_text()))
        if not any(name == allowed or name.startswith(f"{allowed}.") for allowed in ALLOWED)
        and not name.endswith("__version__")
    }
    assert found == set()


def test_every_part_is_there() -> None:
    assert all(hasattr(torch_private, name) for name in torch_private.__all__)


@pytest.mark.parametrize("name", ["serializing", "archive_package"])
def test_modules_are_parts_before_anybody_has_imported_them(name: str) -> None:
    code = "import sys; from graphopt.ir import torch_private; getattr(torch_private, sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, name], check=True)


def test_a_part_that_is_gone_is_named_with_the_versions() -> None:
    with pytest.raises(
        MissingDependencyError, match=r"has no torch\._ops\.Gone .*tested with torch 2"
    ):
        part_of_torch("Gone", "torch._ops", "Gone")


def test_newer_versions_are_warned_of() -> None:
    with pytest.warns(UntestedTorchVersionWarning, match=r"99\.1\.0 is newer than"):
        warn_of_untested("99.1.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untested(f"{TESTED[1]}.7")


def test_the_range_is_that_of_the_package() -> None:
    assert f'"torch>={TESTED[0]},<' in (ROOT / "pyproject.toml").read_text()
    assert torch.__version__.startswith(TESTED)
