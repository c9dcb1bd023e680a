"""What one types first: --version, --help, init, doctor, a preset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers.shell import command
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner

import graphopt
from graphopt.backends.registry import ExportBackend
from graphopt.cli import doctor as doctor_module
from graphopt.cli.exit_codes import EXIT_CODES
from graphopt.cli.main import app
from graphopt.config.joint import JointConfig
from graphopt.config.presets import preset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    torch.export.save(torch.export.export(model, (torch.randn(1, 16),)), tmp_path / "m.pt2")
    return tmp_path


def test_version_is_printed() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"graphopt {graphopt.__version__}\n")


def test_help_of_every_command_has_an_example_of_it_and_the_exit_codes() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert {"fit", "compress", "init", "doctor"} <= set(commands)
    for name, each in commands.items():
        assert each.epilog.startswith(f"Example: graphopt {name} ")
        words = each.epilog.partition("\n")[0].split()[3:]
        known = {option for parameter in each.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, name
        for code, (meaning, _) in EXIT_CODES.items():
            assert f"{code} {meaning}" in each.epilog


def test_help_is_whole_in_eighty_columns() -> None:
    shell = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    commands = get_command(app).commands  # type: ignore[attr-defined]
    overview = " ".join(shell.invoke(app, ["--help"]).output.split())
    for name, each in commands.items():
        shown = shell.invoke(app, [name, "--help"]).output
        assert max(map(len, shown.splitlines())) <= 80
        words = " ".join(shown.split())
        for parameter in each.params:
            assert all(option in words.split() for option in parameter.opts[:1]), parameter.name
            assert " ".join((parameter.help or "").split()) in words, parameter.name
        assert f"{name} {each.help.partition(chr(10) * 2)[0]}" in overview


def test_init_says_a_command_that_can_be_typed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    typed = CliRunner().invoke(app, ["init", "m.pt2"]).output.splitlines()[-1].split()
    assert typed[:2] == ["graphopt", "compress"]
    typed[typed.index("-o") + 1] = "o.pt2"
    assert CliRunner().invoke(app, typed[1:]).exit_code == 0
    assert (folder / "o.pt2").exists()


def test_init_writes_a_config_that_can_be_uncommented(folder: Path) -> None:
    done = command(folder, "init", "m.pt2", "-o", "c.yaml", "--preset", "w6")
    assert done.returncode == 0, done.stderr
    text = (folder / "c.yaml").read_text()
    assert JointConfig.from_yaml(folder / "c.yaml") == preset("w6")
    assert "torch.nn.modules.linear.Linear" in text
    assert "2 modules" in text
    assert "Linear, 544 parameters" in text
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if "module_type_configs" in line)
    whole = [*lines[:start], *(line.replace("# ", "", 1) for line in lines[start:])]
    config = JointConfig.from_dict(yaml.safe_load("\n".join(whole)))
    assert config.palettization is not None
    assert list(config.palettization.module_name_configs) == ["0", "2"]
    assert command(folder, "init", "m.pt2", "-o", "c.yaml").returncode == 7


def test_doctor_tries_targets_and_lists_packages(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "targets", lambda: (ExportBackend.Torch,))
    shown = command(folder, "doctor")
    assert shown.returncode == 0
    assert "targets on this machine" in shown.stdout
    assert "lowers and checks: loaded the saved program" in " ".join(shown.stdout.split())
    monkeypatch.setattr(doctor_module, "targets", lambda: ())
    found = json.loads(command(folder, "doctor", "--json").stdout)
    assert found["versions"]["torch"] == torch.__version__


def test_config_may_be_left_out_or_be_the_name_of_a_preset(folder: Path) -> None:
    done = command(folder, "compress", "m.pt2", "-o", "a.pt2", "--json")
    rows = json.loads(done.stdout)["tensors"]
    assert {row["detail"] for row in rows} == {"4-bit, 2 tables on axis 0", "4-bit, one table"}
    refused = command(folder, "compress", "m.pt2", "--config", "w44", "-o", "b.pt2")
    assert refused.returncode == 4
    assert "did you mean 'w4'?" in refused.stderr
    missing = command(folder, "compress", "m.pt2", "--config", "my.yaml", "-o", "b.pt2")
    assert (missing.returncode, "no such file" in missing.stderr) == (4, True)


def test_calls_have_the_size_that_the_program_takes(folder: Path) -> None:
    torch.save(torch.randn(5, 16), folder / "x.pt")
    fixed = nn.Linear(16, 4).eval()
    program = torch.export.export(fixed, (torch.randn(2, 16),))
    torch.export.save(program, folder / "fixed.pt2")
    words = ("analyze", "fixed.pt2", "--data", "x.pt", "--candidates", "4", "--json")
    done = command(folder, *words, "-o", "t.jsonl")
    assert done.returncode == 0, done.stderr
    refused = command(folder, *words, "-o", "u.jsonl", "--batch-size", "4")
    assert refused.returncode == 3
    assert "--batch-size 4: the program takes calls of 2" in refused.stderr
