from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import graphopt
from graphopt.quantization import Quantizer, QuantizerConfig


def test_saved_program_holds_its_example_and_not_the_dataset_behind_it(tmp_path: Path) -> None:
    dataset = torch.randn(4096, 16)
    program = graphopt.compress(nn.Linear(16, 4), (dataset[:2],))
    path = program.save(tmp_path / "net.pt2")
    assert path.stat().st_size < dataset.numel()
    (example,) = program.example_args
    torch.testing.assert_close(example, dataset[:2])


def test_inputs_that_are_no_slices_are_kept_as_they_are() -> None:
    x = torch.randn(2, 16)
    assert graphopt.capture(nn.Linear(16, 4), (x,)).example_args[0] is x


@pytest.mark.integration
def test_saved_programs_load_in_a_process_that_only_imports_the_library(tmp_path: Path) -> None:
    x = torch.randn(2, 16)
    files = []
    for preset in ("w8", "w8a8"):
        quantizer = Quantizer(nn.Linear(16, 4), getattr(QuantizerConfig.presets, preset)())
        quantizer.prepare((x,))
        quantizer.calibrate([x])
        files.append(str(quantizer.program().save(tmp_path / f"{preset}.pt2")))
    code = "import sys, torch, graphopt; [torch.export.load(x).module() for x in sys.argv[1:]]"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_graph_becomes_code_when_it_is_used_and_not_at_every_edit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[fx.Graph] = []
    python_code = fx.Graph.python_code

    def counted(graph: fx.Graph, *args: Any, **kwargs: Any) -> Any:
        made.append(graph)
        return python_code(graph, *args, **kwargs)

    module = graphopt.capture(
        nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (torch.randn(2, 3),)
    ).graph_module
    x = torch.randn(2, 3)
    before = module(x)
    monkeypatch.setattr(fx.Graph, "python_code", counted)
    copied = copy.deepcopy(module)
    (relu,) = (node for node in copied.graph.nodes if "relu" in node.name)
    with copied.graph.inserting_after(relu):
        doubled = copied.graph.call_function(torch.add, (relu, relu))
    relu.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    copied.recompile()
    assert made == []
    assert torch.equal(copied(x), 2 * before)
    assert copied(x) is not None
    assert made == [copied.graph]
    copied.recompile()
    assert "add" in copied.code
    assert fx.symbolic_trace(copied)(x).equal(2 * before)
    assert torch.compile(copy.deepcopy(copied), backend="eager")(x).equal(2 * before)
