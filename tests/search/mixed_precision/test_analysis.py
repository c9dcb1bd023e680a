from __future__ import annotations

import json
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from search.mixed_precision.nets import encoder, pictures, residual, sentences
from torch import nn

import graphopt
from graphopt.compressors.joint import joint_config
from graphopt.errors import CompressionError, InputError
from graphopt.mixed_precision import METRICS, SensitivityTable, analyze
from graphopt.search.mixed_precision.configs import config_for
from graphopt.search.mixed_precision.metrics import measure

pytestmark = pytest.mark.usefixtures("one_thread")


def loop(
    model: nn.Module,
    data: list[torch.Tensor],
    table: SensitivityTable,
    metric: str,
    **options: Any,
) -> dict[str, dict[str, float]]:
    return loops(model, data, table, [metric], **options)[metric]


def loops(
    model: nn.Module,
    data: list[torch.Tensor],
    table: SensitivityTable,
    metrics: list[str],
    **options: Any,
) -> dict[str, dict[str, dict[str, float]]]:
    """The straightforward way: compress one layer in a copy, run the whole model."""
    found: dict[str, dict[str, dict[str, float]]] = {metric: {} for metric in metrics}
    for layer in table.layers:
        for name in layer.candidates:
            chosen = config_for({layer.name: table.candidates[name]}, {layer.name: layer.nodes})
            config = joint_config(chosen)
            if config.quantization is not None:
                config.quantization.migrate_scales = False  # of one layer nothing else may change
            module = graphopt.compress(model, (data[0],), config, **options).module()
            outputs = []
            for x in data:
                with torch.no_grad():
                    got, want = module(x), model(x)
                outputs.append(([got], [want]) if isinstance(got, torch.Tensor) else (got, want))
            for metric, own in found.items():
                values = [measure(METRICS[metric], *pairs) for pairs in outputs]
                own.setdefault(layer.name, {})[name] = float(np.mean(values))
    return found


@pytest.mark.slow
def test_exact_values_are_those_of_the_loop() -> None:
    model, x, metrics = residual(), pictures(), ["psnr", "kl", "top1"]
    table = analyze(model, (x[0],), [2, "3 g4", 6, "int8"], x, metrics)
    expected = loops(model, x, table, metrics, correct_statistics=False)
    for metric in metrics:
        for layer, own in table.values(metric).items():
            assert own == pytest.approx(expected[metric][layer], rel=1e-4, abs=1e-6), metric


@pytest.mark.slow
def test_exact_values_of_tied_weights_and_two_outputs() -> None:
    model, ids = encoder(), sentences()
    table = analyze(model, (ids[0],), [2, 4], ids)
    expected = loop(model, ids, table, "psnr", correct_statistics=False)
    for layer, own in table.values().items():
        assert own == pytest.approx(expected[layer], abs=1e-3)


@pytest.mark.integration
def test_activations_are_rounded_over_the_range_of_all_data() -> None:
    model, x = residual(), pictures()
    act = {
        "acts": {"activation": {"dtype": "int8", "qparam_calculator_cls": "global_minmax"}},
        "both": {
            "quantize": {
                "dtype": "int4",
                "granularity": {"type": "per_channel"},
                "algorithm": "nearest",
            },
            "activation": {
                "dtype": "uint8",
                "qscheme": "asymmetric",
                "qparam_calculator_cls": "global_minmax",
            },
        },
    }
    table = analyze(model, (x[0],), act, x, "mse", layer_candidates={"stem|conv1|side": ["keep"]})
    expected = loop(model, x, table, "mse", calibration_data=x, correct_statistics=False)
    found = table.values()
    for layer in ("conv2.weight", "head.weight"):
        assert found[layer] == pytest.approx(expected[layer], rel=0.02)


@pytest.mark.integration
def test_what_is_kept_changes_nothing() -> None:
    table = analyze(residual(), (pictures(1)[0],), ["keep", 4], pictures(1), ["psnr", "kl"])
    assert all(own["keep"] == np.inf for own in table.values().values())
    assert all(own["keep"] == 0 for own in table.values("kl").values())
    assert all(
        row["candidate"] != "keep" or row["bits_per_weight"] == 16 for row in table.to_rows()
    )


class OneNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.integration
@pytest.mark.parametrize("correction", ["statistics", "batch_norm", "bias"])
def test_corrections_of_one_layer_are_those_of_compress(correction: Any) -> None:
    torch.manual_seed(0)
    model, x = OneNorm().eval(), pictures()
    # with data, "auto" would be output feedback
    plain_kmeans = {
        name: {"palettize": {"n_bits": bits, "algorithm": "kmeans"}}
        for name, bits in (("2-bit", 2), ("3-bit", 3))
    }
    table = analyze(model, (x[0],), plain_kmeans, x, "mse", correction=correction)
    plain = loop(model, x, table, "mse", correct_statistics=False)
    corrected = loop(model, x, table, "mse", calibration_data=x)
    found = table.values()
    in_front = {"conv.weight": correction != "bias", "head.weight": correction != "batch_norm"}
    for layer, taken in in_front.items():
        expected = corrected if taken else plain
        assert found[layer] == pytest.approx(expected[layer], rel=2e-3)
        assert plain[layer]["2-bit"] > 1.5 * corrected[layer]["2-bit"]  # they matter here


# --- files ----------------------------------------------------------------------------------------
class Interrupt(Exception):
    pass


@pytest.mark.integration
@pytest.mark.parametrize("mode", ["exact", "fast", "hybrid"])
def test_an_interrupted_run_goes_on_where_it_stopped(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = residual(), pictures()
    path = tmp_path / "table.jsonl"
    whole = analyze(model, (x[0],), [2, 4], x, mode=mode)
    calls = 0
    from graphopt.search.mixed_precision import records

    original = records.Records._append

    def failing(self: Any, line: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Interrupt
        original(self, line)

    monkeypatch.setattr(records.Records, "_append", failing)
    with pytest.raises(Interrupt):
        analyze(model, (x[0],), [2, 4], x, mode=mode, path=path)
    with path.open("a") as file:
        file.write('{"batch": 1, "data": "cut off in the mid')
    done = len(path.read_text().splitlines())
    assert done == 1 + 2 + 1
    monkeypatch.setattr(records.Records, "_append", original)
    table = analyze(model, (x[0],), [2, 4], x, mode=mode, path=path)
    assert table.values() == whole.values()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    per_batch = {"exact": 5, "fast": 1, "hybrid": 6}[mode]
    assert len(lines) == 1 + 3 * per_batch  # nothing was measured twice
    assert SensitivityTable.load(path).values() == whole.values()


@pytest.mark.integration
def test_other_models_data_or_settings_do_not_mix(tmp_path: Path) -> None:
    x = pictures()
    path = tmp_path / "table.jsonl"
    analyze(residual(), (x[0],), [2, 4], x, path=path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="the model's weights"):
        analyze(residual(1), (x[0],), [2, 4], x, path=path)
    with pytest.raises(InputError, match="candidates"):
        analyze(residual(), (x[0],), [2, 6], x, path=path)
    with pytest.raises(InputError, match="metrics"):
        analyze(residual(), (x[0],), [2, 4], x, "mse", path=path)
    with pytest.raises(InputError, match="batch 0 was measured on other data"):
        analyze(residual(), (x[0],), [2, 4], x[::-1], path=path)
    assert path.read_bytes() == before
    with pytest.raises(InputError, match="the weights differ"):
        SensitivityTable.load(path, residual(1), (x[0],))
    restarted = analyze(residual(1), (x[0],), [2, 4], x, path=path, resume=False)
    assert SensitivityTable.load(path, residual(1), (x[0],)).values() == restarted.values()


@pytest.mark.integration
def test_more_data_extend_a_table(tmp_path: Path) -> None:
    x = pictures()
    path = tmp_path / "table.jsonl"
    analyze(residual(), (x[0],), [2], x[:1], path=path)
    table = analyze(residual(), (x[0],), [2], x, path=path)
    assert table.batches == 3
    assert table.values() == analyze(residual(), (x[0],), [2], x).values()


@pytest.mark.integration
def test_exports_hold_every_row(tmp_path: Path) -> None:
    import pandas as pd

    x = pictures(1)
    table = analyze(residual(), (x[0],), [2, 4], x, ["psnr", "mse"])
    frame = table.to_pandas()
    assert list(frame["candidate"][:2]) == ["2-bit", "4-bit"]
    assert len(frame) == 10
    for name, read in (("t.csv", pd.read_csv), ("t.parquet", pd.read_parquet)):
        path = tmp_path / name
        table.to_csv(path) if name == "t.csv" else table.to_parquet(path)
        pd.testing.assert_frame_equal(read(path), frame, check_dtype=False, rtol=1e-9)
    drawn = table.plot()
    assert [line.get_label() for line in drawn.get_lines()] == ["2-bit", "4-bit"]


@pytest.mark.integration
def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    for text in ("", "no line end", "no json\n", '{"a": 1}\n', "[]\n"):
        path.write_text(text)
        with pytest.raises(InputError, match="not a sensitivity table"):
            SensitivityTable.load(path)
        if text:
            with pytest.raises(InputError, match="not a sensitivity table"):
                analyze(residual(), (pictures(1)[0],), [4], pictures(1), path=path)
            assert path.read_text() == text
    with pytest.raises(InputError, match="cannot be read"):
        SensitivityTable.load(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": []}, "no data"),
        ({"metric": "snr"}, "no metric"),
        ({"metric": "top1", "mode": "fast"}, "predicts"),
        ({"mode": "quick"}, "mode must be"),
        ({"correction": "all"}, "correction must be"),
        ({"data": [(torch.randn(2, 2, 8, 8), torch.zeros(1))]}, "do not fit"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    x = pictures(1)
    with pytest.raises(InputError, match=message):
        analyze(residual(), (x[0],), [4], **{"data": x, **options})


def test_a_weight_with_nan_is_named() -> None:
    model, x = residual(), pictures(1)
    model.conv2.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(CompressionError, match=r"conv2\.weight"):
        analyze(model, (x[0],), [4], x)


# --- executors ------------------------------------------------------------------------------------
def sharpness(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found - reference).abs().max())


sharpness.larger_is_better = False  # type: ignore[attr-defined]


def threads() -> Executor:
    return ThreadPoolExecutor(2)


def processes() -> Executor:
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"))


@pytest.mark.parametrize("pool", [threads, pytest.param(processes, marks=pytest.mark.slow)])
def test_results_do_not_depend_on_the_executor(pool: Any, tmp_path: Path) -> None:
    model, x = residual(), pictures()
    options: dict[str, Any] = {"mode": "hybrid", "correction": "statistics"}
    here = analyze(model, (x[0],), [2, 4], x, ["psnr", "kl"], **options)
    path = tmp_path / "table.jsonl"
    with pool() as executor:
        there = analyze(
            model, (x[0],), [2, 4], x, ["psnr", "kl"], path=path, executor=executor, **options
        )
    for metric in ("psnr", "kl"):
        for layer, own in here.values(metric).items():
            assert there.values(metric)[layer] == pytest.approx(own, rel=1e-5)
    np.testing.assert_allclose(there.interactions(), here.interactions(), rtol=1e-3, atol=1e-9)
    assert SensitivityTable.load(path).values() == there.values()


@pytest.mark.slow
def test_dask_measures_batches_on_a_cluster() -> None:
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    model, x = residual(), pictures()
    here = analyze(model, (x[0],), [2, 4], x)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        there = analyze(model, (x[0],), [2, 4], x, executor=client.get_executor())
    for layer, own in here.values().items():
        assert there.values()[layer] == pytest.approx(own, rel=1e-5)


@pytest.mark.integration
def test_a_metric_of_ones_own_travels_if_it_can_be_imported() -> None:
    model, x = residual(), pictures(2)
    with threads() as executor:
        table = analyze(model, (x[0],), [2], x, sharpness, executor=executor)
        assert table.values() == analyze(model, (x[0],), [2], x, sharpness).values()
        with pytest.raises(InputError, match="cannot be sent"):
            analyze(model, (x[0],), [2], x, lambda a, b: 0.0, executor=executor)


@pytest.mark.integration
def test_table_that_got_no_further_than_its_first_line_is_begun_anew(tmp_path: Path) -> None:
    path, x = tmp_path / "table.jsonl", pictures(1)
    analyze(residual(1), (x[0],), [2], x, path=path)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    found = analyze(residual(1), (x[0],), [2, 4], x, path=path)
    assert {row["candidate"] for row in found.to_rows()} == {"2-bit", "4-bit"}
