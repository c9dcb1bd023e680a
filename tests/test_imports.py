"""Imports that import-linter does not see: inside functions, of private names, and too early."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# optional packages, each behind an extra, and what is installed with them
OPTIONAL = {"coreai", "coreai_torch", "coremltools", "executorch", "torchao", "matplotlib"}
OPTIONAL |= {"pandas", "distributed", "ml_dtypes", "onnx_ir"}
_EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OPTIONAL |= {re.split(r"\W", given)[0] for extra in _EXTRAS.values() for given in extra}
OPTIONAL -= {"graphopt"}
# what takes long to import and is needed by some calls only
LATE = {"torch.fx.experimental.symbolic_shapes"}
HEAVY = ("numba", "scipy", "networkx", "rich", "typer")


def modules() -> list[Path]:
    folders = ("graphopt", "passes", "backends")
    found = {path.resolve() for folder in folders for path in (ROOT / folder).rglob("*.py")}
    return sorted(path.relative_to(ROOT) for path in found)


def imports_in(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names]


@pytest.mark.parametrize("path", modules(), ids=str)
def test_functions_import_only_optional_packages(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text())
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    inside = {module for function in functions for module, _ in imports_in(function)}
    late = {module for module in inside if module.split(".")[0] not in OPTIONAL}
    assert late - LATE == set()


@pytest.mark.parametrize("path", modules(), ids=str)
def test_private_names_stay_in_their_file(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text())
    private = {
        f"{module}.{name}"
        for module, names in imports_in(tree)
        if module.split(".")[0] == "graphopt"
        for name in [*module.split("."), *names]
        if name.startswith("_") and not name.startswith("__")
    }
    assert private == set()


@pytest.mark.integration
def test_importing_the_package_loads_no_heavy_dependency() -> None:
    code = f"import sys, graphopt; print([name for name in {HEAVY!r} if name in sys.modules])"
    words = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_compressors_load_nothing_that_only_some_calls_need() -> None:
    heavy = ("numba", "scipy", "networkx", "typer", "torch._dynamo", "torch._inductor", "sympy")
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import graphopt.palettization, graphopt.quantization, graphopt.pruning; graphopt.compress\n"
        "first = [name for name in ('rich', 'graphopt.search') if name in sys.modules]\n"
        "import graphopt.pipelines\n"
        "first += [name for name in ('graphopt.search.rdo.session',) if name in sys.modules]\n"
        f"print(first + [name for name in {heavy} if name in sys.modules and name not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_commands_load_nothing_that_only_some_of_them_need() -> None:
    heavy = ("numba", "scipy", "networkx", "torch._dynamo", "torch._inductor", "sympy")
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import graphopt.cli.main\n"
        f"print([name for name in {heavy} if name in sys.modules and name not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_packages_of_compressors_need_no_import_of_their_own() -> None:
    code = (
        "import graphopt; print(graphopt.quantization.QuantizerConfig.__name__,"
        " graphopt.palettization.KMeansPalettizer.__name__, graphopt.pruning.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["QuantizerConfig", "KMeansPalettizer", "graphopt.pruning"]


def test_old_module_names_give_the_new_ones_names_with_a_warning() -> None:
    import graphopt.editor

    from graphopt.ir.editor import Editor

    with pytest.warns(DeprecationWarning, match=r"graphopt\.editor has moved to graphopt\.ir"):
        assert graphopt.editor.Editor is Editor


@pytest.mark.parametrize("folder", ["graphopt", "passes", "backends", "tests", "examples"])
def test_nothing_here_imports_an_old_module_name(folder: str) -> None:
    """A test that patches one would patch nothing."""
    from graphopt import moved

    old = {f"graphopt.{name}" for name in moved.MOVED}
    importing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / folder).rglob("*.py")
        if path != Path(__file__)
        for module, names in imports_in(ast.parse(path.read_text()))
        for name in (module, *(f"{module}.{name}" for name in names))
        if name in old
    }
    assert importing == set()


def test_every_old_module_name_leads_to_a_module_with_names() -> None:
    from graphopt import moved

    for old in moved.MOVED:
        module = sys.modules[f"graphopt.{old}"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            assert all(hasattr(module, name) for name in module.names())


def test_every_renamed_class_and_function_is_found_under_its_old_name() -> None:
    from graphopt import moved

    for old, new in moved.MOVED.items():
        module = importlib.import_module(f"graphopt.{new}")
        for name, renamed in moved.RENAMED.get(new, {}).items():
            with pytest.warns(DeprecationWarning, match=r"has moved"):
                found = getattr(sys.modules[f"graphopt.{old}"], name)
            assert found is getattr(module, renamed)


def test_names_that_left_a_module_that_stays_are_found_with_a_warning() -> None:
    from graphopt import ExportBackend, specs

    with pytest.warns(DeprecationWarning, match=r"ExportBackend has moved to graphopt\.backends"):
        assert specs.ExportBackend is ExportBackend
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        specs.Nothing  # noqa: B018
