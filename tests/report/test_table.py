"""The table of a compression: what it holds, prints and writes."""

from __future__ import annotations

import io
import json
import math
import pickle

import pytest
import torch
from rich.console import Console
from torch import nn

import graphopt
from graphopt.errors import StateError
from graphopt.ir.records import ActivationRecord, CompressionRecord, TensorRecord
from graphopt.report.table import CompressionTable

X = torch.randn(2, 8)


def row(name: str, bits: int = 8, **more: object) -> TensorRecord:
    return TensorRecord(name=name, shape=(4, 2), status="palettized", stored_bits=bits, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def program() -> graphopt.CompressedProgram:
    torch.manual_seed(0)
    return graphopt.compress(nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 4)).eval(), X)


def test_a_report_is_the_record_with_its_program(program: graphopt.CompressedProgram) -> None:
    report = program.report()
    assert type(report) is CompressionTable is graphopt.CompressionTable
    assert report.program is program
    record = graphopt.Program.table.fget(program)  # type: ignore[attr-defined]
    assert type(record) is CompressionRecord
    assert report.rows == record.rows
    assert report.rows


def test_print_and_rich_show_the_same_rows(program: graphopt.CompressedProgram) -> None:
    report = program.report()
    console = Console(width=140, no_color=True, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    assert console.export_text() == str(report) == str(program.table)
    assert all(line.name in str(report) for line in report)


def test_a_narrow_terminal_shows_names_and_figures_whole() -> None:
    name = "blocks.12.conv2.weight"
    table = CompressionTable((row(name, 4 * 8 * 1024**2, ops=("conv2d",), snr_db=24.1),), ())
    shown = {}
    for width in (80, 140):
        console = Console(width=width, no_color=True, record=True, file=io.StringIO())
        console.print(table)
        shown[width] = console.export_text()
        assert name in shown[width]
        assert "4096.00" in shown[width]
        assert max(map(len, shown[width].splitlines())) <= width
    assert "conv2d" in shown[140]
    assert "conv2d" not in shown[80]
    assert "4×2" not in shown[80]


def test_json_has_every_row_and_no_infinity() -> None:
    activations = (ActivationRecord(name="x", status="float", detail="why"),)
    table = CompressionTable((row("a", snr_db=math.inf), row("b", 16)), ("remark",), activations)
    plain = json.loads(table.to_json())
    assert [line["name"] for line in plain["tensors"]] == ["a", "b"]
    assert plain["tensors"][0]["snr_db"] is None
    assert plain["tensors"][1]["bits_per_weight"] == 2
    assert plain["stored_bytes"] == 3
    assert plain["bits_per_weight"] == 24 / 16
    assert plain["warnings"] == ["remark"]
    assert plain["activations"][0]["detail"] == "why"


def test_a_table_without_a_program_has_no_page(tmp_path: object) -> None:
    with pytest.raises(StateError, match="program.report"):
        CompressionTable((row("a"),)).to_html(f"{tmp_path}/page.html")


def test_the_record_is_saved_with_a_graph(program: graphopt.CompressedProgram) -> None:
    loaded = pickle.loads(pickle.dumps(program.graph_module))
    assert graphopt.Program(loaded, (X,)).table.rows == program.report().rows
