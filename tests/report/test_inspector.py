"""What the inspector shows of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.reported_nets import Block, X, names
from torch import nn

from graphopt.errors import InputError
from graphopt.inspection import (
    ModelInspector,
    OpInfo,
)
from graphopt.palettization import KMeansPalettizer, KMeansPalettizerConfig
from graphopt.pruning import MagnitudePruner
from graphopt.quantization import Quantizer


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
    with pytest.raises(InputError, match="not a valid regular expression"):
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


@pytest.mark.integration
def test_exported_programs_are_inspected_by_the_same_names(net: nn.Module, tmp_path: Path) -> None:
    exported = torch.export.export(net, (X,))
    torch.export.save(exported, tmp_path / "net.pt2")
    found = ModelInspector(tmp_path / "net.pt2").get_matched_ops_for_module_name("first")
    assert [op.op_type for op in found] == ["linear", "relu", "add"]
