"""Files of measurements and sweeps: damaged, of another score, or written by two runs at once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import InputError, OutputError
from graphopt.files import locked
from graphopt.mixed_precision import SensitivityTable, analyze

X = torch.linspace(-1, 1, 64).reshape(8, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def measured(path: Path | None, metric: Any = "mse", **options: Any) -> SensitivityTable:
    return analyze(net(), (X[:2],), [2, 4], [X[:4], X[4:]], metric, path=path, **options)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_flipped_bit_costs_a_measurement_and_changes_none(
    tmp_path: Path, mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t.jsonl"
    wanted = measured(path, mode=mode).values()
    whole = path.read_bytes()
    for place in (40, len(whole) // 2, len(whole) - 20):
        broken = bytearray(whole)
        broken[place] ^= 1
        path.write_bytes(bytes(broken))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert measured(path, mode=mode).values() == wanted
        assert "computed again" in caplog.text
        assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def metric_of(sign: float) -> Any:
    def distance(output: Tensor, reference: Tensor) -> float:
        return sign * float((output - reference).abs().mean())

    return distance


def test_two_metrics_of_one_name_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    measured(path, metric_of(1.0))
    measured(path, metric_of(1.0))
    with pytest.raises(InputError, match="what the metric computes"):
        measured(path, metric_of(2.0))


def test_biases_and_buffers_decide_too(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    measured(path)
    other = net()
    with torch.no_grad():
        other[0].bias += 1
    with pytest.raises(InputError, match="the model's weights"):
        analyze(other, (X[:2],), [2, 4], [X[:4], X[4:]], "mse", path=path)


def score_of(scale: float) -> Any:
    def score(module: nn.Module) -> float:
        with torch.no_grad():
            return scale * float(module(X).sum())

    return score


def test_scores_of_another_function_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, table = tmp_path / "s.jsonl", measured(None)
    first = table.sweep([3, 4], score_of(1.0), path=path)
    with caplog.at_level(logging.WARNING):
        second = table.sweep([3, 4], score_of(2.0), path=path)
    assert "scores of another function are not used" in caplog.text
    for one, two in zip(first.points, second.points, strict=True):
        assert two.score == pytest.approx(2 * one.score)
    size = path.stat().st_size
    assert table.sweep([3, 4], score_of(1.0), path=path).points == first.points
    assert path.stat().st_size == size, "its own scores are still there"


def test_a_second_run_on_one_path_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with locked(path), pytest.raises(OutputError, match=r"is being written by process \d+"):
        measured(path)
    measured(path)
    assert [each.name for each in tmp_path.iterdir()] == ["t.jsonl"]


def test_a_record_of_another_shape_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    table = measured(path)
    for values in ("x", [1], {"2-bit": 3}, {"2-bit": {"mse": "x"}}, None):
        measured(path, resume=False)
        line = {"batch": 0, "data": "x", "layer": "0.weight", "values": values}
        assert table._records.file is not None
        table._records.file.append(line)
        with pytest.raises(InputError, match="not a sensitivity table"):
            SensitivityTable.load(path)
