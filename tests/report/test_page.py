"""The page of a report, and drawings of graphs."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import yaml
from helpers.browser import evaluated, needs_browser
from helpers.reported_nets import X
from torch import nn

import graphopt
from graphopt import mixed_precision
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.config.joint import JointConfig
from graphopt.errors import ArtifactExistsError, InputError, StateError
from graphopt.inspection import (
    diff,
    save_graph,
    write_page,
)
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.quantization import QuantizerConfig


@pytest.fixture(scope="module")
def compressed(net: nn.Module) -> CompressedProgram:
    return graphopt.compress(
        net,
        (X,),
        {"palettization": {}, "quantization": {}},
        calibration_data=[X],
        correct_statistics=False,
    )


# --- reports ----------------------------------------------------------------------------------------------
class Curve:
    """Anything that can draw itself."""

    def plot(self) -> Any:
        from matplotlib.figure import Figure

        ax = Figure().add_subplot()
        ax.plot([2, 4, 6], [70, 90, 91])
        ax.set_title("accuracy of a curve")
        return ax


@pytest.fixture(scope="module")
def page(
    net: nn.Module, compressed: CompressedProgram, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    return compressed.report().to_html(
        path,
        before=net,
        data=[X],
        config={"palettization": {"bits": 4}},
        title="A <net>",
    )


def data_of(page: Path) -> dict[str, Any]:
    """What the page's scripts read."""
    found = re.search(r"<script type='application/json' id='data'>(.*?)</script>", page.read_text())
    assert found is not None
    return json.loads(found[1])


def test_page_shows_the_record_and_the_difference(
    page: Path, net: nn.Module, compressed: CompressedProgram
) -> None:
    data = data_of(page)
    difference = {layer.name: layer for layer in diff(net, compressed, [X])}
    assert [row["name"] for row in data["weights"]] == [row.name for row in compressed.table]
    for row in data["weights"]:
        record = compressed.table[row["name"]]
        layer = difference[row["name"]]
        assert row["bits"] == pytest.approx(record.bits_per_weight, rel=1e-4)
        assert row["before"] == 4 * record.numel
        assert row["weight_db"] == pytest.approx(record.snr_db, rel=1e-4)
        assert row["own_db"] == pytest.approx(layer.own_sqnr, rel=1e-4)
        assert row["output_db"] == pytest.approx(layer.output_sqnr, rel=1e-4)
        entries = data["palettes"][row["name"]]["entries"]
        assert len(entries) == 2**record.n_bits
        assert sum(data["palettes"][row["name"]]["counts"]) == record.numel
    assert [row["name"] for row in data["activations"]] == [
        record.name for record in compressed.table.activations
    ]
    assert [row[0] for row in data["passes"]] == [each.name for each in compressed.pass_report]
    tiles = {what: value for what, value, _ in data["tiles"]}
    assert tiles["bits per compressed weight"] == f"{compressed.table.bits_per_weight:.3f}"
    assert tiles["measured, outputs"] == f"{diff(net, compressed, [X]).output_sqnr[0]:.1f} dB"
    assert data["texts"] == [["Config", "palettization: {bits: 4}\n"]]


def test_page_of_a_recipe_shows_what_was_predicted(net: nn.Module, tmp_path: Path) -> None:
    recipe = mixed_precision.analyze(net, (X,), data=[X], mode="fast").recipe(target_bpw=6)
    program = graphopt.compress(net, (X,), recipe.to_config())
    page = program.report().to_html(tmp_path / "page.html", recipe=recipe)
    tiles = {what: value for what, value, _ in data_of(page)["tiles"]}
    assert tiles["predicted psnr"] == f"{recipe.value:.4g}"
    assert "measured psnr" not in tiles


@pytest.mark.parametrize(
    "config",
    [
        JointConfig.model_validate({"palettization": {}, "quantization": {}}),
        KMeansPalettizerConfig.presets.w4(),
        QuantizerConfig.presets.w8a8_affine(),
    ],
    ids=["joint", "tables", "integers"],
)
def test_page_shows_a_config_as_one_that_can_be_read(
    config: Any, compressed: CompressedProgram, tmp_path: Path
) -> None:
    page = compressed.report().to_html(tmp_path / "page.html", config=config)
    ((_, text),) = data_of(page)["texts"]
    read = yaml.safe_load(text)
    again = type(config).from_dict(read) if hasattr(config, "from_dict") else None
    assert (again or JointConfig.model_validate(read)) == config


def test_page_loads_nothing_and_escapes_its_title(page: Path) -> None:
    text = page.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"<(link|img|iframe|script[^>]+src)", text)
    assert "A &lt;net&gt;" in text
    assert len(text) < 1_400_000


@pytest.mark.integration
def test_what_draws_itself_is_drawn(
    net: nn.Module, compressed: CompressedProgram, tmp_path: Path
) -> None:
    page = write_page(compressed, tmp_path / "page.html", sensitivities=Curve(), curve=Curve())
    text = page.read_text()
    assert text.count("accuracy of a curve") == 2
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 20


def test_page_is_the_same_for_the_same_program(
    page: Path, net: nn.Module, compressed: CompressedProgram, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"before": net, "data": [X], "title": "A <net>"}
    options["config"] = {"palettization": {"bits": 4}}
    again = write_page(compressed, tmp_path / "again.html", **options)
    assert again.read_text() == page.read_text()
    with pytest.raises(ArtifactExistsError):
        write_page(compressed, again)


@pytest.mark.slow
@needs_browser
def test_page_is_drawn_by_a_browser(page: Path, tmp_path: Path) -> None:
    expression = (
        "[document.querySelectorAll('.js-plotly-plot').length, weightTable.body.rows.length,"
        " document.documentElement.scrollWidth <= innerWidth, viewers[0].state().boxes]"
    )
    for width in (500, 1200, 2000):
        (plots, rows, fits, boxes), errors = evaluated(page, tmp_path, expression, width)
        assert errors == []
        assert (plots, rows, fits) == (3, 3, True)
        assert boxes > 10


def test_report_is_json_too(compressed: CompressedProgram) -> None:
    found = json.loads(compressed.report().to_json())
    assert [row["status"] for row in found["tensors"] if row["status"] != "skipped"] == [
        "palettized"
    ] * 3
    assert found["activations"]
    assert found["stored_bytes"] == compressed.report().stored_bytes


def test_table_without_a_program_has_no_page(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"program\.report"):
        graphopt.CompressionTable(()).to_html(tmp_path / "page.html")


# --- pictures ---------------------------------------------------------------------------------------------
def test_graph_is_drawn_with_its_annotations(compressed: CompressedProgram, tmp_path: Path) -> None:
    text = save_graph(compressed, tmp_path / "graph.svg").read_text()
    ET.fromstring(text)
    for name in ("lut_to_dense", "quantize_per_tensor", "linear_1"):
        assert name in text


def test_graph_is_written_for_viewers(compressed: CompressedProgram, tmp_path: Path) -> None:
    graph = nx.read_graphml(save_graph(compressed, tmp_path / "graph.graphml"))
    nodes = compressed.graph_module.graph.nodes
    assert set(graph.nodes) == {node.name for node in nodes}
    assert graph.number_of_edges() == sum(len(node.all_input_nodes) for node in nodes)
    assert graph.nodes["linear"]["module"] == "first.linear"
    assert "QuantizationSpec" in graph.nodes["linear"]["annotation"]
    plain = json.loads(save_graph(compressed, tmp_path / "graph.json", weights=False).read_text())
    assert not [node for node in plain["nodes"] if node["kind"] == "weight"]
    with pytest.raises(InputError, match=r"use \.html"):
        save_graph(compressed, tmp_path / "graph.onnx")
