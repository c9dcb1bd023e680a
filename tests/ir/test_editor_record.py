"""What passes record and note through the editor."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import graphopt
from graphopt.analysis.open_dims import open_dims
from graphopt.ir.annotations import (
    annotate_dropout,
    annotate_norm,
    clear_notes,
    dropout_rate,
    forget_record,
    is_fused_norm,
    note_pass,
    notes_of,
    passes_provided,
    passes_run,
    record,
    record_of,
)
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import Editor
from graphopt.ir.records import ActivationRecord, CompressionRecord, TensorRecord
from graphopt.prepared.findings import findings_of, keep_findings


@pytest.fixture
def gm() -> CapturedModule:
    return graphopt.capture(nn.Linear(3, 2).eval(), torch.randn(1, 3)).graph_module


def row(name: str, detail: str = "") -> TensorRecord:
    return TensorRecord(name=name, status="quantized", detail=detail)


def test_a_fresh_module_has_nothing_recorded(gm: CapturedModule) -> None:
    assert record_of(gm) == CompressionRecord(())
    assert notes_of(gm) == passes_run(gm) == passes_provided(gm) == ()


def test_records_add_up_and_later_rows_replace_earlier_ones(gm: CapturedModule) -> None:
    edit = Editor(gm)
    edit.record([row("a", "first"), row("b")], remarks=["one"])
    activation = ActivationRecord(name="x", status="quantized")
    edit.record([row("a", "second")], remarks=["two"], activations=[activation])
    done = record_of(gm)
    assert [(line.name, line.detail) for line in done] == [("b", ""), ("a", "second")]
    assert done.warnings == ("one", "two")
    assert done.activations == (activation,)


def test_recording_and_noting_are_no_changes_of_the_graph(gm: CapturedModule) -> None:
    edit = Editor(gm)
    edit.record([row("a")])
    edit.note("first")
    edit.note("second")
    assert not edit.changed
    assert notes_of(gm) == ("first", "second")


def test_record_and_notes_begin_anew_when_cleared(gm: CapturedModule) -> None:
    record(gm, [row("a")])
    Editor(gm).note("text")
    forget_record(gm)
    clear_notes(gm)
    assert not len(record_of(gm))
    assert notes_of(gm) == ()


def test_a_copy_keeps_its_own_record(gm: CapturedModule) -> None:
    Editor(gm).record([row("a")])
    other = copy.deepcopy(gm)
    Editor(other).record([row("b")])
    assert [line.name for line in record_of(gm)] == ["a"]
    assert [line.name for line in record_of(other)] == ["a", "b"]


def test_what_is_saved_with_a_module(gm: CapturedModule) -> None:
    edit = Editor(gm)
    edit.record([row("a")])
    edit.note("text")
    note_pass(gm, "mine", ["other"])
    keep_findings(gm, fitted_to_outputs=True)
    node = next(node for node in gm.graph.nodes if node.op == "call_function")
    annotate_dropout(node, 0.25)
    loaded = pickle.loads(pickle.dumps(gm))
    again = next(each for each in loaded.graph.nodes if each.name == node.name)
    assert [line.name for line in record_of(loaded)] == ["a"]
    assert notes_of(loaded) == ("text",)
    assert passes_run(loaded) == ("mine",)
    assert passes_provided(loaded) == ("other",)
    assert dropout_rate(again) == 0.25
    assert findings_of(gm).fitted_to_outputs
    assert not findings_of(loaded).fitted_to_outputs


def test_annotations_of_a_node_stand_beside_each_other(gm: CapturedModule) -> None:
    node = next(iter(gm.graph.nodes))
    assert dropout_rate(node) is None
    annotate_norm(node)
    annotate_dropout(node, 0.5)
    assert is_fused_norm(node)
    assert dropout_rate(node) == 0.5


def test_new_calls_leave_sizes_open() -> None:
    """Kernels of C++ take sizes as integers; the program that the graph was copied from shares them."""
    program = graphopt.capture(nn.ReLU(), torch.randn(2, 3, 4, 4))
    gm = copy.deepcopy(program.graph_module)
    (relu,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    edit = Editor(gm)
    padded = edit.call(torch.ops.aten.constant_pad_nd.default, relu, [1, 1, 2, 2], like=relu)
    assert isinstance(padded.meta["val"].shape[0], torch.SymInt)
    assert [dim.axis for dim in open_dims(program)] == [0, 1, 2, 3]
