"""What is drawn twice has equal bytes, and an unknown format is an error of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import InputError
from graphopt.inspection import save_graph
from graphopt.ir.program import Program
from graphopt.mixed_precision import analyze
from graphopt.palettization import KMeansPalettizerConfig

X = torch.linspace(-1, 1, 16).reshape(2, 8)


def compressed() -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))
    return graphopt.compress(net, (X,), KMeansPalettizerConfig())


def test_pictures_pages_and_graphs_of_a_program_have_equal_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = [f"g{end}" for end in (".explorer.json", ".html", ".svg", ".png", ".graphml", ".gexf")]
    program = compressed()
    for folder in ("one", "two"):
        for name in names:
            save_graph(program, tmp_path / folder / name)
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_charts_and_recipes_of_equal_tables_have_equal_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from graphopt.search.mixed_precision.plots import save_plot

    torch.manual_seed(0)
    table = analyze(nn.Linear(8, 4), (X,), [2, 4], [X], "mse")
    for folder in ("one", "two"):
        table.recipe(target_bpw=8).save(tmp_path / folder / "r.yaml")
        for name in ("c.svg", "c.pdf", "c.png"):
            save_plot(table.plot(), tmp_path / folder / name)
    for name in ("c.svg", "c.pdf", "c.png", "r.yaml"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with pytest.raises(InputError, match="no picture can end in .docx"):
        save_plot(table.plot(), tmp_path / "c.docx")
