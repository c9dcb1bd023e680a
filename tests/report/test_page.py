"""The page of a report, and drawings of graphs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from helpers.reported_nets import Net, X
from torch import nn

import graphopt
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.errors import ArtifactExistsError, InputError, StateError
from graphopt.inspection import (
    save_graph,
    write_page,
)
from graphopt.palettization import KMeansPalettizer


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
        path, before=net, data=[X], sensitivities=Curve(), curve=Curve(), title="A <net>"
    )


@pytest.mark.integration
def test_page_holds_all_parts_and_no_address(page: Path, compressed: CompressedProgram) -> None:
    text = page.read_text()
    for part in (
        "Sizes",
        "Errors",
        "Layers",
        "Tensors",
        "Weights and their palettes",
        "Sensitivities",
        "Accuracy over bits",
        "first.linear.weight",
        "A &lt;net&gt;",
    ):
        assert part in text
    # names of XML are no addresses that a browser opens
    for address in ("<script", "<link", "<img", "url(http", "src="):
        assert address not in text
    assert text.count("<svg") == 2 + len(compressed.report().palettized) + 2


def test_page_is_the_same_for_the_same_program(
    page: Path, net: nn.Module, compressed: CompressedProgram, tmp_path: Path
) -> None:
    again = write_page(
        compressed,
        tmp_path / "again.html",
        before=net,
        data=[X],
        sensitivities=Curve(),
        curve=Curve(),
        title="A <net>",
    )
    assert again.read_text() == page.read_text()
    with pytest.raises(ArtifactExistsError):
        write_page(compressed, again)


@pytest.mark.skipif(
    not (shutil.which("chromium") or shutil.which("google-chrome")),
    reason="no Chromium on this machine",
)
def test_page_is_drawn_by_a_browser_without_network(page: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    picture = tmp_path / "page.png"
    subprocess.run(
        [
            str(browser),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1100,1600",
            f"--screenshot={picture}",
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (1600, 1100)
    assert (pixels < 0.5).any(axis=2).mean() > 0.005  # text
    blue = (pixels[..., 2] > 0.7) & (pixels[..., 0] < 0.4)
    assert blue.mean() > 0.001  # bars of sizes after compression


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
    with pytest.raises(InputError, match=r"use \.svg"):
        save_graph(compressed, tmp_path / "graph.onnx")


@pytest.mark.integration
def test_ids_of_a_page_are_unique_and_references_are_met(tmp_path: Path) -> None:
    model, x = Net().eval(), torch.randn(2, 16)
    palettizer = KMeansPalettizer(model)
    palettizer.prepare((x,))
    text = write_page(palettizer.program(), tmp_path / "page.html", before=model).read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 50
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', text)) <= set(ids)
