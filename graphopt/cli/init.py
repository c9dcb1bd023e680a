"""graphopt init: a config to begin with, with the names and types of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.backends.lowering import as_program
from graphopt.backends.registry import DEFAULT
from graphopt.cli.artifacts import check_report
from graphopt.cli.common import OUT, Model
from graphopt.config.presets import DEFAULT_PRESET, preset_names, preset_text
from graphopt.files import replaced
from graphopt.inspection import inspect_program
from graphopt.ir.program import Program

__all__ = ["init"]


def init(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Config to write, .yaml.")] = Path(
        "config.yaml"
    ),
    preset: Annotated[
        str, typer.Option(help=f"What it begins with: {', '.join(preset_names())}.")
    ] = DEFAULT_PRESET,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Write a commented config with the module names and types of a model."""
    check_report(output, (".yaml", ".yml"), overwrite=overwrite)
    text = config_text(as_program(model), preset, model)
    with replaced(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    OUT.print(f"{output}: preset {preset}, and the modules of {model.name}. Edit it, then")
    command = f"graphopt compress {model} --config {output} -o model{DEFAULT.suffix}"
    OUT.print(command, soft_wrap=True, highlight=False)


def config_text(program: Program, preset: str, source: Path) -> str:
    """A preset as YAML, followed by comments with what can be named of a program.

    Args:
        program: Whose modules are listed.
        preset: Name of the preset.
        source: File of the program, for the heading.

    Raises:
        ConfigError: There is no such preset.
    """
    text = preset_text(preset)
    modules = [row for row in inspect_program(program).modules if row.ops and row.parameters]
    types: dict[str, int] = {}
    for row in modules:
        types[row.type] = types.get(row.type, 0) + 1
    width = max(map(len, types), default=0)
    lines = [
        f"# A config for {source.name}, from preset {preset!r}; below it the modules of this model. Take a `# `",
        "# away to give one a config of its own: null leaves it as it is, names are regular expressions, the",
        "# last that matches counts, and names come before types.",
        text.rstrip(),
        "  # module_type_configs:",
    ]
    for kind, count in types.items():
        number = "1 module" if count == 1 else f"{count} modules"
        lines.append(f"  #   {kind}: {'null':<{width - len(kind) + 6}}# {number}")
    lines.append("  # module_name_configs:")
    for row in modules:
        about = f"{row.type.rpartition('.')[2]}, {row.parameters:,} parameters"
        lines.append(f'  #   "{_escaped(row.name)}": null  # {about}')
    return "\n".join(lines) + "\n"


def _escaped(name: str) -> str:
    """A name as a regular expression within a double-quoted YAML text."""
    return name.replace(".", r"\\.")
