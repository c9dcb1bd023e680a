from __future__ import annotations

import csv
from pathlib import Path

import pytest

from graphopt.files import replaced, write_csv


def test_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    with replaced(target) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("interruption", [OSError, KeyboardInterrupt])
def test_what_was_there_stays_after_an_interruption(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write() -> None:
        with replaced(target) as temporary:
            temporary.write_text("half")
            raise interruption

    with pytest.raises(interruption):
        write()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.mlpackage"
    target.mkdir()
    (target / "old").write_text("")
    with replaced(target) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.mlpackage"]


def test_rows_are_written_under_their_heading(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"x": 1, "y": "ü"}], ["x", "y"])
    with path.open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{"x": "1", "y": "ü"}]
