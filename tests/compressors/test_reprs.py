"""What is typed into a notebook says in a line what it is."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import graphopt
from graphopt import pipelines
from graphopt.mixed_precision import analyze
from graphopt.palettization import KMeansPalettizer


def test_reprs_are_one_short_line_without_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(4, 16)
    program = graphopt.capture(model, (x,))
    compressed = graphopt.compress(program)
    artifact = graphopt.lower(compressed, "torch")
    assert "not saved" in repr(artifact)
    artifact.save(tmp_path / "m.pt2")
    palettizer = KMeansPalettizer(model)
    assert repr(palettizer) == "KMeansPalettizer(Sequential, not prepared)"
    palettizer.prepare((x,))
    pipeline = pipelines.palettize(data=[x])
    table = analyze(program, None, [2, 4], [x])
    things = {
        "Pipeline('palettize'": pipeline,
        "PausedRun('palettize'": pipeline.pause("palettize-weights", program),
        "Program(Sequential: 1 ops, inputs": program,
        "CompressedProgram(Sequential": compressed,
        "PassReport(": compressed.pass_report,
        "CompressionTable(1 of 1 tensors compressed, 9.412 bits": compressed.report(),
        "TorchArtifact(": artifact,
        "KMeansPalettizer(Sequential, prepared)": palettizer,
        "SensitivityTable(1 layers, 2 candidates, psnr)": table,
        "Recipe(1 layers: ": table.recipe(target_bpw=6),
    }
    for start, thing in things.items():
        text = repr(thing)
        assert text.startswith(start), text
        assert len(text) < 160 + len(str(tmp_path)), text
        assert "\n" not in text
