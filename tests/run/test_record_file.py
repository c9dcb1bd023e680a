"""Files of long runs: whatever has become of them, no record is taken for what it is not."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.errors import InputError
from graphopt.run.content import content_hash
from graphopt.run.record_file import RecordFile, sealed, unsealed

HEAD = {"format": "a test", "version": 2, "weights": "abc", "layers": ["a", "b"]}
RECORDS = [{"batch": number, "value": 0.1 * number, "name": "ü"} for number in range(3)]


def difference(other: dict[str, Any]) -> str:
    return ", ".join(key for key in HEAD if HEAD[key] != other.get(key))


def written(path: Path) -> RecordFile:
    file = RecordFile(path, dict(HEAD))
    assert file.resume(difference) == []
    for record in RECORDS:
        file.append(record)
    return file


def test_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    file = written(path)
    assert file.resume(difference) == RECORDS
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["batch"] for line in lines[1:]] == [0, 1, 2], "each line is JSON to others"
    got = RecordFile.read(path, "a test", 2, lambda head, records: (head, list(records)))
    assert got == (HEAD, RECORDS)


def test_each_flipped_bit_is_found_and_costs_one_record_or_two(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    written(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        for bit in range(8):
            broken = bytearray(whole)
            broken[place] ^= 1 << bit
            path.write_bytes(bytes(broken))
            kept = RecordFile(path, dict(HEAD)).resume(difference)
            assert all(record in RECORDS for record in kept)
            assert len(kept) >= 1, (place, bit)
            after = RecordFile(path, dict(HEAD)).resume(difference)
            assert after == kept, "what was damaged is gone"
            in_records = place > whole.index(b"\n")
            assert not in_records or len(kept) < 3


def test_what_is_damaged_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.jsonl"
    written(path)
    path.write_bytes(path.read_bytes().replace(b'"value": 0.1', b'"value": 0.9'))
    with caplog.at_level(logging.WARNING):
        assert RecordFile(path, dict(HEAD)).resume(difference) == [RECORDS[0], RECORDS[2]]
    assert "1 records are computed again" in caplog.text
    path.write_bytes(path.read_bytes().replace(b'"value": 0.2', b'"value": 0.9'))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        got = RecordFile.read(path, "a test", 2, lambda _, records: list(records))
    assert got == [RECORDS[0]]
    assert "1 damaged records are left out" in caplog.text


def test_a_file_cut_anywhere_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    written(path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = RecordFile(path, dict(HEAD)).resume(difference)
        assert kept == RECORDS[: len(kept)]
        assert path.read_bytes() == whole[: len(path.read_bytes())]


def test_records_of_another_run_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    written(path)
    before = path.read_bytes()
    other = {**HEAD, "weights": "other"}
    with pytest.raises(InputError, match="other settings: weights"):
        RecordFile(path, other).resume(lambda head: "weights")
    assert path.read_bytes() == before
    # lines of one file put into another
    lines = before.split(b"\n")
    path.write_bytes(sealed(other) + b"\n" + b"\n".join(lines[1:]))
    assert RecordFile(path, other).resume(difference) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": "a test", "version": 1}\n{"batch": 0}\n', "version 1; this release reads 2"),
        (b'{"format": "other"}\n', "not a a test"),
        (b"nothing\n", "not a a test, or damaged"),
        (b"[" * 100_000 + b"\n", "not a a test"),
        (b"\xff\xfe\x00\n\n\n", "not a a test"),
    ],
)
def test_other_files_are_left_alone(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        RecordFile(path, dict(HEAD)).resume(difference)
    with pytest.raises(InputError):
        RecordFile.read(path, "a test", 2, lambda head, records: records)
    assert path.read_bytes() == content


def test_what_is_sealed_comes_back_only_as_it_was() -> None:
    line = sealed({"x": [1, None, 1e-9]}, "salt")
    assert unsealed(line, "salt") == {"x": [1, None, 1e-9]}
    assert unsealed(line, "pepper") is None
    assert unsealed(line[:-1], "salt") is None
    assert unsealed(b"", "salt") is None


# --- what decides is what it computes ---------------------------------------------------------------
OFFSET = 1.0


def by_offset(x: float) -> float:
    return x + OFFSET


def scores(scale: float) -> Any:
    def score(x: float) -> float:
        return scale * x

    return score


class Score:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, x: float) -> float:
        return self.scale * x

    def method(self, x: float) -> float:
        return self.scale + x


def test_functions_of_one_name_that_compute_other_things_differ() -> None:
    pairs: list[tuple[Any, Any]] = [
        (scores(1.0), scores(2.0)),
        (lambda x: x, lambda x: -x),
        (Score(1.0), Score(2.0)),
        (Score(1.0).method, Score(2.0).method),
        (functools.partial(scores, 1.0), functools.partial(scores, 2.0)),
        ({"a": [1, 2]}, {"a": [1, 3]}),
        (torch.zeros(3), torch.ones(3)),
        (np.zeros(3), np.zeros(3, dtype=np.float32)),
        (nn.Linear(2, 2), nn.Linear(2, 2)),
    ]
    for one, other in pairs:
        assert content_hash(one) != content_hash(other), one


def test_equal_functions_have_equal_hashes() -> None:
    for make in (lambda: scores(1.0), lambda: Score(3.0), lambda: Score(3.0).method, dict, print):
        assert content_hash(make()) == content_hash(make())
    circle: list[Any] = []
    circle.append(circle)
    assert content_hash(circle) == content_hash(circle)


def test_what_a_function_takes_from_its_module_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = content_hash(by_offset)
    monkeypatch.setitem(globals(), "OFFSET", 2.0)
    assert content_hash(by_offset) != before
