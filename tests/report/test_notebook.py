"""Tables in notebooks."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from rich.console import Group
from rich.table import Table
from rich.text import Text

from graphopt.ir.records import TensorRecord
from graphopt.report.difference import Difference, LayerDifference
from graphopt.report.notebook import ShownAsTable, table_html
from graphopt.report.table import CompressionTable


def cells(text: str) -> list[list[str]]:
    return [[cell.text or "" for cell in row] for row in ET.fromstring(text).iter("tr")]


def test_cells_are_those_of_the_terminal_without_its_markup() -> None:
    table = Table(title="a < b")
    table.add_column("name")
    table.add_column("size", justify="right")
    table.add_row("[bold]x[/bold] & y", "1.5")
    text = table_html(table)
    assert cells(text) == [["name", "size"], ["x & y", "1.5"]]
    assert "<caption>a &lt; b</caption>" in text
    assert "text-align:right" in text


def test_reports_are_tables_in_notebooks() -> None:
    row = TensorRecord(name="w", shape=(4, 8), status="palettized", stored_bits=128, n_bits=4)
    found = cells(CompressionTable((row,))._repr_html_())
    assert found[1][0] == "w"
    assert found[1][2:4] == ["4×8", "4.000"]
    layer = LayerDifference("w", "linear", "linear", (4, 8), "float32", 4, 1, 128, 16, 20.0)
    assert cells(Difference((layer,))._repr_html_())[1][0] == "w"


def test_several_tables_and_sentences_stand_below_one_another() -> None:
    class Pair(ShownAsTable):
        def __rich__(self) -> Group:
            first = Table("layer", title="one")
            first.add_row("a <b>")
            return Group(first, Text("measured: 3 dB"))

    shown = Pair()._repr_html_()
    assert shown.index("one") < shown.index("a &lt;b&gt;") < shown.index("<p>measured: 3 dB</p>")
    assert "measured: 3 dB" in str(Pair())
