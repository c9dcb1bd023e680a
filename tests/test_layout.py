"""Files stay short, and tests stand where the code that they test stands."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 400
# of whole workflows, of speed, of random inputs, and what tests share
OTHER = {"end_to_end", "benchmarks", "fuzz", "helpers"}


def files(*folders: str) -> list[Path]:
    """Python files below folders of the checkout, each once: `graphopt/` has links."""
    every = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted({path.resolve() for path in every})


def test_no_file_has_more_than_400_lines() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in files("graphopt", "passes", "backends", "tests", "examples")
    }
    assert lengths, "no files"
    assert {name: n for name, n in lengths.items() if n > LIMIT} == {}


def test_every_folder_of_tests_mirrors_one_of_the_package() -> None:
    folders = {path.parent.relative_to(ROOT / "tests") for path in files("tests")} - {Path()}
    assert folders
    strangers = {
        str(folder)
        for folder in folders
        if folder.parts[0] not in OTHER
        and not (ROOT / "graphopt" / folder / "__init__.py").exists()
    }
    assert strangers == set()


def test_every_file_of_tests_is_collected() -> None:
    """What holds tests has a name that pytest looks for; what tests share has not."""
    for path in files("tests"):
        holds_tests = "\ndef test_" in path.read_text()
        assert path.name.startswith("test_") == holds_tests, path
