from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from graphopt.cli.main import app
from graphopt.cli.options import Fields, Given, shell_command
from graphopt.rdo import RDOConfig
from graphopt.search.mixed_precision.options import AnalysisOptions, RecipeOptions
from graphopt.specs.options import Options, field_help


@dataclass(frozen=True, kw_only=True)
class Files(Options):
    """Files of a command.

    Attributes:
        source: Where to read.
        force: Go on.
    """

    source: str
    force: Annotated[bool, typer.Option("--force")] = False


def taken(*words: str) -> dict[str, Any]:
    """What a command with a group, fields of options and fields of a config is called with."""
    calls: list[dict[str, Any]] = []

    def work(
        files: Files,
        how: Annotated[Given, Fields(RecipeOptions, "target_bpw", "solver", "pin")],
        config: Annotated[Given, Fields(RDOConfig, "family", "seed")],
        count: int = 3,
    ) -> None:
        calls.append({"files": files, "how": how, "config": config, "count": count})

    own = typer.Typer()
    own.command()(shell_command(work))
    done = CliRunner().invoke(own, list(words))
    assert done.exit_code == 0, done.output
    return calls[0]


def test_defaults_of_commands_are_those_of_the_options() -> None:
    assert taken("--source", "a") == {
        "files": Files(source="a", force=False),
        "how": {"target_bpw": None, "solver": RecipeOptions().solver, "pin": {}},
        "config": {},
        "count": 3,
    }


def test_given_options_arrive_in_their_objects() -> None:
    words = ("--source", "a", "--force", "--bpw", "2.5", "--solver", "greedy", "--pin", "a=b=2-bit")
    assert taken(*words, "--family", "palette", "--seed", "7", "--count", "1") == {
        "files": Files(source="a", force=True),
        "how": {"target_bpw": 2.5, "solver": "greedy", "pin": {"a=b": "2-bit"}},
        "config": {"family": "palette", "seed": 7},
        "count": 1,
    }


@pytest.mark.parametrize("name", ["mode", "correction", "resume", "seed"])
def test_help_of_commands_is_what_options_document(name: str) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    shown = {parameter.name: parameter for parameter in commands["analyze"].params}
    assert shown[name].help == field_help(AnalysisOptions)[name]
    assert shown[name].default == getattr(AnalysisOptions(), name)
