"""Options of targets as options of commands."""

from __future__ import annotations

import functools
import inspect
from typing import Annotated, Any, Literal

import typer

from graphopt.backends import load_backend
from graphopt.backends.options import ShellOption, shell_options
from graphopt.backends.registry import targets

__all__ = ["TargetFields"]


class TargetFields:
    """The options that targets declare, as metadata of a command's parameter.

    >>> def lower(model: Model, form: Annotated[Given, TargetFields()]): ...
    """

    def __init__(self) -> None:
        self.parameters = [_parameter(name, option) for name, option in _offered().items()]

    def take(self, given: dict[str, Any]) -> dict[str, Any]:
        """Option → value of those that were given."""
        values = {parameter.name: given.pop(parameter.name) for parameter in self.parameters}
        return {name: value for name, value in values.items() if value is not None}


@functools.cache
def _offered() -> dict[str, ShellOption]:
    """Options of all targets; those of one name are one, with the values of each."""
    offered: dict[str, ShellOption] = {}
    for target in targets():
        for name, option in shell_options(load_backend(target).options).items():
            known = offered.setdefault(name, option)
            choices = tuple(dict.fromkeys((*known.choices, *option.choices)))
            offered[name] = ShellOption(known.help, choices)
    return offered


def _parameter(name: str, option: ShellOption) -> inspect.Parameter:
    kind: Any = Literal[option.choices]
    annotation = Annotated[kind | None, typer.Option(help=option.help)]
    place = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, place, default=None, annotation=annotation)
