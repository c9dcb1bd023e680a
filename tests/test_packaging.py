from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from graphopt.backends.registry import targets

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "graphopt", "passes", "backends", "tests", "examples"),
    *("Makefile", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("mkdocs.yml", "llms.txt", ".gitignore", ".ci"),
}


def folders(root: str) -> set[str]:
    found = set()
    for init in (ROOT / root).rglob("__init__.py"):
        parts = init.parent.relative_to(ROOT).parts
        if root == "graphopt" and len(parts) > 1 and parts[1] in ("passes", "backends"):
            continue  # the links
        found.add(".".join(parts if root == "graphopt" else ("graphopt", *parts)))
    return found


def test_every_folder_with_code_is_in_the_package_list() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == folders("graphopt") | folders("passes") | folders("backends")


def test_top_level_holds_what_it_should() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    assert {line.split("/")[0] for line in tracked.stdout.splitlines()} == TOP_LEVEL


def test_extras_are_complete() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    named = {target.extra for target in targets() if target.extra}
    named |= {"torchao", "plot", "distributed", "examples"}
    assert set(extras) == named | {"all", "dev", "docs"}
    assert extras["all"] == [f"graphopt[{','.join(sorted(named, key=list(extras).index))}]"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the checkout and unpacked where nothing else is."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    target = folder / "target"
    zipfile.ZipFile(wheel).extractall(target)
    return target


def run_in(target: Path, code: str) -> subprocess.CompletedProcess[str]:
    # -P keeps the checkout off the path; the target comes before any editable install
    lines = f"import sys; sys.path.insert(0, {str(target)!r})\n{code}"
    words = [sys.executable, "-P", "-W", "ignore", "-c", lines]
    return subprocess.run(words, cwd=target, capture_output=True, text=True, check=False)


@pytest.mark.integration
def test_wheel_holds_every_module_and_they_import(installed: Path) -> None:
    modules = sorted(
        str(path.relative_to(installed).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for path in (installed / "graphopt").rglob("*.py")
    )
    assert "graphopt.passes.palettize_weights" in modules
    assert "graphopt.backends.coreml.evaluate" in modules
    # the links in graphopt/ make every module reachable once
    sources = {
        path.resolve()
        for folder in ("graphopt", "passes", "backends")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert len(modules) == len(sources)
    checks = "\n".join(
        f"import {name}; assert sys.modules[{name!r}].__file__.startswith({str(installed)!r})"
        for name in modules
    )
    done = run_in(installed, checks)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["passes", "backends", "tests"])
def test_bare_folder_names_do_not_import_from_the_wheel(installed: Path, name: str) -> None:
    done = run_in(installed, f"import {name}")
    assert done.returncode != 0
    assert "No module named" in done.stderr


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_bare_folder_names_are_refused_in_the_checkout(name: str) -> None:
    words = [sys.executable, "-c", f"import {name}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"import graphopt.{name}, not {name}" in done.stderr


@pytest.mark.integration
def test_core_imports_no_extra() -> None:
    extras = (
        "coreai",
        "coreai_torch",
        "coremltools",
        "executorch",
        "torchao",
        "sklearn",
        "skimage",
        "transformers",
        "matplotlib",
        "pandas",
        "dask",
    )
    code = (
        "import sys, graphopt, graphopt.palettization, graphopt.passes, graphopt.backends,"
        " graphopt.cli.main\n"
        f"loaded = [name for name in {extras!r} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    words = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.errors import MissingDependencyError
    from graphopt.extras import require

    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'graphopt\[coreml\]'"):
        require("coremltools", "coreml")
