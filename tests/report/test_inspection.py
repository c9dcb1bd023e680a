from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.errors import ArtifactExistsError, InputError, StateError
from graphopt.inspection import (
    ModelInspector,
    OpInfo,
    bits_per_weight,
    diff,
    save_graph,
    write_page,
)
from graphopt.numerics.packing import unpack
from graphopt.palettization import KMeansPalettizer, KMeansPalettizerConfig
from graphopt.pruning import MagnitudePruner
from graphopt.quantization import Quantizer, QuantizerConfig


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) + x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.second = Block()
        self.head = nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def compressed(net: nn.Module) -> CompressedProgram:
    return graphopt.compress(
        net,
        (X,),
        {"palettization": {}, "quantization": {}},
        calibration_data=[X],
        correct_statistics=False,
    )


# --- ModelInspector -----------------------------------------------------------------------------------
def names(found: tuple[OpInfo, ...]) -> list[str]:
    return [op.op_name for op in found]


def test_ops_are_found_by_the_keys_of_configs(net: nn.Module) -> None:
    inspector = ModelInspector(net, (X,))
    assert names(inspector.get_matched_ops_for_op_type("linear")) == [
        "linear",
        "linear_1",
        "linear_2",
    ]
    assert names(inspector.get_matched_ops_for_op_name("linear_[0-9]")) == ["linear_1", "linear_2"]
    assert names(inspector.get_matched_ops_for_module_name("first")) == ["linear", "relu", "add"]
    assert names(inspector.get_matched_ops_for_module_name(r".*\.linear")) == ["linear", "linear_1"]
    assert names(inspector.get_matched_ops_for_module_type(Block)) == [
        "linear",
        "relu",
        "add",
        "linear_1",
        "relu_1",
        "add_1",
    ]
    assert names(inspector.get_matched_ops_for_module_type("torch.nn.modules.linear.Linear")) == [
        "linear",
        "linear_1",
        "linear_2",
    ]
    with pytest.raises(InputError, match="no regular expression"):
        inspector.get_matched_ops_for_op_name("(")


def test_configs_select_what_the_inspector_shows(net: nn.Module) -> None:
    inspector = ModelInspector(net, (X,), compressor=KMeansPalettizer)
    shown = inspector.get_matched_ops_for_module_name("second.*")
    everything = KMeansPalettizerConfig().global_config
    config = KMeansPalettizerConfig(global_config=None).set_module_name("second.*", everything)
    palettizer = KMeansPalettizer(net, config)
    palettizer.prepare((X,))
    assert [row.nodes[0] for row in palettizer.summary().palettized] == names(shown)


@pytest.mark.parametrize(
    ("compressor", "expected"),
    [
        (None, {"linear", "relu", "add"}),
        (Quantizer, {"linear", "relu", "add"}),
        (KMeansPalettizer, {"linear"}),
        (MagnitudePruner, {"linear"}),
    ],
)
def test_only_what_a_compressor_takes_is_listed(
    net: nn.Module, compressor: type | None, expected: set[str]
) -> None:
    inspector = ModelInspector(net, (X,), compressor=compressor)
    assert {op.op_type for op in inspector.summary.model.all_ops()} == expected
    with pytest.raises(InputError, match="compressor must be"):
        ModelInspector(net, (X,), compressor=nn.Linear)


def test_tree_has_modules_boundaries_and_edges(net: nn.Module) -> None:
    root = ModelInspector(net, (X,)).summary.model
    assert root.module_name == ""
    assert [module.module_name for module in root.modules()] == [
        "",
        "first",
        "first.linear",
        "second",
        "second.linear",
        "head",
    ]
    first = root.get_submodule("first")
    assert first.module_type.endswith("Block")
    assert [op.op_name for op in first.ops] == ["relu", "add"]
    assert [(e.op.op_name, e.index) for e in first.input_ops[0]] == [("linear", 0), ("add", 1)]
    assert (first.output_ops[0].op.op_name, first.output_ops[0].index) == ("add", 0)
    linear = first.get_submodule("first.linear").ops[0]
    assert [edge.op_name for edge in linear.inputs] == [
        "x",
        "first.linear.weight",
        "first.linear.bias",
    ]
    assert [edge.is_state for edge in linear.inputs] == [False, True, True]
    assert linear.outputs == {0: (OpInfo("relu", "relu"),)}
    assert [context.module_name for context in linear.module_stack] == ["", "first", "first.linear"]
    assert linear.source_frames[-1].function_name == "forward"
    with pytest.raises(KeyError, match="third"):
        root.get_submodule("third")


def test_summary_names_everything(net: nn.Module) -> None:
    text = ModelInspector(net, (X,)).format_summary(False)
    for part in (
        "■ second.linear (torch.nn.modules.linear.Linear)",
        "◆ linear_1 [linear]",
        "states: weight, bias",
        "return torch.relu(self.linear(x)) + x",
    ):
        assert part in text
    assert "\x1b[" not in text
    assert "\x1b[" in ModelInspector(net, (X,)).format_summary(True)


def test_exported_programs_are_inspected_by_the_same_names(net: nn.Module, tmp_path: Path) -> None:
    exported = torch.export.export(net, (X,))
    torch.export.save(exported, tmp_path / "net.pt2")
    found = ModelInspector(tmp_path / "net.pt2").get_matched_ops_for_module_name("first")
    assert [op.op_type for op in found] == ["linear", "relu", "add"]


# --- bits -------------------------------------------------------------------------------------------------
def test_bits_are_those_of_the_tensors(net: nn.Module) -> None:
    plain = bits_per_weight(net, (X,))
    elements = sum(p.numel() for p in net.parameters())
    assert (plain.bpw, plain.total_bits, plain.total_weights) == (32, 32 * elements, elements)


def test_bits_of_tables_are_indices_tables_and_biases(net: nn.Module) -> None:
    palettizer = KMeansPalettizer(net)
    prepared = palettizer.prepare((X,))
    weights, biases = 2 * 256 + 64, 32
    expected = 4 * weights + 3 * 16 * 32 + 32 * biases
    for program in (palettizer.program(), prepared):
        found = bits_per_weight(program)
        assert found.total_bits == expected
        assert found.total_weights == weights + biases
        assert found.per_module_map["head"] == pytest.approx((4 * 64 + 16 * 32) / 64)


def test_bits_of_int8_weights_are_integers_and_scales(net: nn.Module) -> None:
    quantizer = Quantizer(net, QuantizerConfig.presets.w8())
    prepared = quantizer.prepare((X,))
    found = bits_per_weight(quantizer.program())
    # a scale of 32 bits per channel; zero points are 0
    assert found.total_bits == 8 * (2 * 256 + 64) + 36 * 32 + 32 * 32
    assert found.total_weights == 2 * 256 + 64 + 32
    with pytest.raises(InputError, match="still observes"):
        bits_per_weight(prepared)


def test_bits_of_pruned_weights_are_values_and_masks(net: nn.Module) -> None:
    pruner = MagnitudePruner(net)
    pruner.prepare((X,))
    found = bits_per_weight(pruner.program())
    assert found.total_bits == (2 * 256 + 64) * (16 + 1) + 32 * 32
    assert found.total_weights == 2 * 256 + 64 + 32


# --- diff -------------------------------------------------------------------------------------------------
def sqnr(want: Tensor, got: Tensor) -> float:
    exact = want.double()
    return 10 * math.log10(float(exact.square().sum() / (exact - got.double()).square().sum()))


def test_errors_are_those_of_weights_and_outputs(net: nn.Module) -> None:
    program = graphopt.compress(net, (X,), {"palettization": {}}, correct_statistics=False)
    found = diff(net, program, [X[:3], X[3:]])
    module = program.module()
    dense = {}
    for name in ("first.linear", "second.linear", "head"):
        lookup = torch.ops.graphopt.lut_to_dense
        parts = [module.state_dict()[f"{name}.weight_{part}"] for part in ("indices", "lut")]
        dense[name] = lookup(*parts, 4, list(net.get_submodule(name).weight.shape))
    layers = {layer.name.removesuffix(".weight"): layer for layer in found}
    assert set(layers) == set(dense)
    with torch.no_grad():
        seen: Any = {}
        hooks = [
            net.get_submodule(name).register_forward_hook(
                lambda m, args, out, name=name: seen.__setitem__(name, (args[0], out))
            )
            for name in dense
        ]
        exact = net(X)
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            linear = net.get_submodule(name)
            assert layer.weight_sqnr == pytest.approx(sqnr(linear.weight, dense[name]), abs=1e-3)
            alone = nn.functional.linear(seen[name][0], dense[name], linear.bias)
            assert layer.own_sqnr == pytest.approx(sqnr(seen[name][1], alone), abs=1e-3)
        assert layers["head"].output_sqnr == pytest.approx(sqnr(exact, module(X)), abs=1e-3)
        assert found.output_sqnr == pytest.approx((sqnr(exact, module(X)),), abs=1e-3)
        # nothing before the first layer adds to its error
        assert layers["first.linear"].own_sqnr == layers["first.linear"].output_sqnr
    assert layers["head"].bytes_before == 256
    assert layers["head"].bytes_after == 32 + 64
    assert layers["head"].tables == 1
    assert layers["head"].dtype == "float32 → 4-bit table"
    assert found.worst(1)[0].own_sqnr == min(layer.own_sqnr for layer in found)


def test_folded_norms_are_compared_as_folded() -> None:
    torch.manual_seed(0)
    model = Convolutions().train()
    x = torch.randn(8, 3, 8, 8)
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8) * 2 + 1)
    program = graphopt.compress(model.eval(), (x,), {"quantization": {}}, calibration_data=[x])
    found = diff(model, program, [x])
    assert len(found) == 2
    assert all(30 < layer.weight_sqnr < 60 for layer in found)
    assert all(25 < layer.own_sqnr < 80 for layer in found)


def test_unchanged_layers_are_exact_and_json_has_no_infinity(net: nn.Module) -> None:
    found = diff(net, graphopt.capture(net, (X,)), [X])
    assert all(layer.weight_sqnr == layer.output_sqnr == math.inf for layer in found)
    assert "exact" in str(found)
    plain = json.loads(found.to_json())
    assert plain["layers"][0]["weight_sqnr"] is None


def test_finalized_modules_can_be_compared(net: nn.Module) -> None:
    pytest.importorskip("coreai_torch", reason="needs the extra 'coreai'")
    palettizer = KMeansPalettizer(net)
    palettizer.prepare((X,))
    finalized = palettizer.finalize(backend=graphopt.ExportBackend.CoreAI)
    assert [layer.bits for layer in diff(net, finalized, [X])] == [
        layer.bits for layer in diff(net, palettizer.program(), [X])
    ]


def test_other_models_are_refused(net: nn.Module) -> None:
    other = graphopt.capture(nn.Sequential(nn.Conv1d(4, 4, 1)).eval(), (torch.randn(1, 4, 4),))
    with pytest.raises(InputError, match="no op with a weight in common"):
        diff(graphopt.capture(net, (X,)), other)


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


# --- what else diff and bits meet -----------------------------------------------------------------------
class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def test_recurrent_weights_are_compared_gate_by_gate() -> None:
    model, x = Recurrent().eval(), torch.randn(2, 5, 16)
    palettizer = KMeansPalettizer(model)
    palettizer.prepare((x,))
    program = palettizer.program()
    found = diff(model, program, [x])
    names = ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"]
    assert [row.name for row in found] == [*(f"lstm.{name}" for name in names), "head.weight"]
    exact, rounded = model.lstm.double(), copy.deepcopy(model.lstm).double()
    for row in list(found)[:4]:
        weight = getattr(exact, row.name.removeprefix("lstm."))
        dense = _dense(program, row.name).double()
        energy, noise = weight.square().sum(), (weight - dense).square().sum()
        assert row.weight_sqnr == pytest.approx(10 * math.log10(float(energy / noise)), abs=1e-4)
        setattr(rounded, row.name.removeprefix("lstm."), nn.Parameter(dense))
    want, got = ((y, *states) for y, states in (exact(x.double()), rounded(x.double())))
    energy = sum(float(each.square().sum()) for each in want)
    noise = sum(float((a - b).square().sum()) for a, b in zip(want, got, strict=True))
    assert found.layers[0].own_sqnr == pytest.approx(10 * math.log10(energy / noise), abs=1e-3)


def _dense(program: CompressedProgram, name: str) -> Tensor:
    state = program.module().state_dict()
    codes = unpack(state[f"{name}_indices"], 4, program.table[name].numel)
    return state[f"{name}_lut"].flatten()[codes.long()].reshape(program.table[name].shape)


def test_keyword_inputs_are_compared() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(16, 8)

        def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
            return self.f(x) + y

    model, call = Keyword().eval(), {"x": torch.randn(2, 16), "y": torch.randn(2, 8)}
    palettizer = KMeansPalettizer(model)
    palettizer.prepare((call["x"],), {"y": call["y"]})
    assert diff(model, palettizer.program(), [call]).output_sqnr[0] > 15
    assert diff(model, model, [call]).output_sqnr == (math.inf,)


def test_programs_of_two_models_are_not_compared() -> None:
    x = torch.randn(2, 16)
    with pytest.raises(InputError, match="not made from the first"):
        diff(nn.Sequential(nn.Linear(16, 8)), nn.Sequential(nn.Linear(16, 4)), [x])
    with pytest.raises(InputError, match="do not fit the captured graph"):
        diff(graphopt.capture(Net().eval(), (x,)), Net().eval(), [torch.randn(2, 17)])


@pytest.mark.coreai
def test_bits_of_a_module_finalized_for_a_target_are_those_of_the_program() -> None:
    palettizer = KMeansPalettizer(nn.Sequential(nn.Linear(64, 128)).eval())
    palettizer.prepare((torch.randn(2, 64),))
    by_hand = (64 * 128 * 4 + 16 * 32 + 128 * 32) / (64 * 128 + 128)
    for made in (palettizer.program(), *(palettizer.finalize(backend=t) for t in TARGETS)):
        assert bits_per_weight(made).bpw == pytest.approx(by_hand)


TARGETS = ("coreai", "coreml", "torch")


def test_zero_points_that_are_zero_are_not_counted() -> None:
    x = torch.randn(2, 64)
    model = nn.Sequential(nn.Linear(64, 128, bias=False)).eval()
    quantizer = Quantizer(model)
    quantizer.prepare((x,))
    quantizer.calibrate([x])
    program = quantizer.program()
    by_hand = 8 + 32 * 128 / (64 * 128)
    assert bits_per_weight(program).bpw == pytest.approx(by_hand)
    assert diff(model, program, example_inputs=(x,)).layers[0].bits == pytest.approx(by_hand)


def test_ids_of_a_page_are_unique_and_references_are_met(tmp_path: Path) -> None:
    model, x = Net().eval(), torch.randn(2, 16)
    palettizer = KMeansPalettizer(model)
    palettizer.prepare((x,))
    text = write_page(palettizer.program(), tmp_path / "page.html", before=model).read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 50
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', text)) <= set(ids)
