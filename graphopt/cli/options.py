"""Commands from option objects: names, defaults and help of the shell's options are their fields'."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo, ParameterInfo

from graphopt.backends.registry import ExportBackend
from graphopt.cli.target_options import TargetFields
from graphopt.errors import ConfigError
from graphopt.specs.artifact import read_bytes
from graphopt.specs.model import SpecModel
from graphopt.specs.options import Options, field_help

__all__ = ["Fields", "Flag", "Given", "shell_command"]

Given = dict[str, Any]  # field → value


@dataclass(frozen=True)
class Flag:
    """How the shell shows a field that it cannot show as it is.

    Attributes:
        names: Names of the option; the field's own when empty.
        type: Type in the shell; the field's own when None.
        read: Makes the field's value of the shell's.
        help: Help; the first sentence of the field's when empty.
        required: Whether it must be given.
    """

    names: tuple[str, ...] = ()
    type: Any = None
    read: Callable[[Any], Any] | None = None
    help: str = ""
    required: bool = False


def _pins(given: list[str] | None) -> dict[str, str]:
    pins = {}
    for text in given or []:
        pattern, sign, candidate = text.rpartition("=")
        if not sign:
            raise ConfigError(f"--pin {text!r}: write pattern=candidate")
        pins[pattern] = candidate
    return pins


def _numbers(text: str | None) -> list[int | str] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    return [int(part) if part.isdigit() else part for part in parts]


def _policy(lenient: bool) -> str:
    return "warn" if lenient else "error"


_FLAGS: Mapping[str, Flag] = {
    "activation_memory": Flag(type=str | None),
    "backend": Flag(type=ExportBackend | None),
    "candidates": Flag(type=str | None, read=_numbers, help="Such as '4,6,8' or 'int4 b32,int8'."),
    "evaluations": Flag(help="Models that --refine may measure."),
    "on_unmatched": Flag(
        ("--lenient",), bool, _policy, "Config keys that match nothing only warn."
    ),
    "out": Flag(("--output", "-o"), Path, required=True),
    "overwrite": Flag(("--overwrite",)),
    "pin": Flag(
        ("--pin",),
        list[str] | None,
        _pins,
        "'pattern=candidate' that layers must have; may be repeated.",
    ),
    "resume": Flag(("--resume/--restart",)),
    "work_dir": Flag(type=Path | None),
    "target_bpw": Flag(("--bpw",)),
    "target_bytes": Flag(
        ("--bytes",),
        str | None,
        lambda text: None if text is None else read_bytes(text),
        "Largest size of the file, as 1500000, 1.5MB (powers of 1000) or 1.5MiB (of 1024).",
    ),
}


class Fields:
    """Fields of an option object that a command shows, as metadata of its parameter.

    >>> def analyze(model: Model, how: Annotated[Given, Fields(AnalysisOptions, "mode", "seed")]): ...

    Args:
        options: An option object, or a config; fields of a config are None until they are given.
        names: Which of its fields, in the order of the help.
    """

    def __init__(self, options: type[Options] | type[SpecModel], *names: str) -> None:
        self.names = names
        self._partial = not is_dataclass(options)
        hints, texts = get_type_hints(options), field_help(options)
        defaults = (
            {field.name: field.default for field in fields(options)}
            if is_dataclass(options)
            else {}
        )
        self.parameters = [
            self._parameter(name, hints[name], defaults.get(name), texts[name]) for name in names
        ]

    def _parameter(self, name: str, hint: Any, default: Any, text: str) -> inspect.Parameter:
        flag = _FLAGS.get(name, Flag())
        hint = hint if flag.type is None else flag.type
        if self._partial:
            hint |= None
        if flag.type is bool:
            default = False
        info = typer.Option(*flag.names, help=flag.help or text)
        shown = inspect.Parameter.empty if flag.required else default
        return _keyword(name, Annotated[hint, info], shown)

    def take(self, given: Given) -> Given:
        """Field → value, those out that a config was not given."""
        values = {name: given.pop(name) for name in self.names}
        if self._partial:
            values = {name: value for name, value in values.items() if value is not None}
        readers = {name: _FLAGS.get(name, Flag()).read for name in values}
        return {
            name: value if (read := readers[name]) is None else read(value)
            for name, value in values.items()
        }


class _Group:
    """Options of the shell alone: a dataclass whose fields a command shows, all of them."""

    def __init__(self, options: type[Options]) -> None:
        self._options = options
        hints, texts = get_type_hints(options, include_extras=True), field_help(options)
        self.parameters = []
        for field in fields(options):
            info = _info(hints[field.name], texts[field.name])
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            self.parameters.append(_keyword(field.name, info, default))

    def take(self, given: Given) -> Options:
        return self._options(
            **{parameter.name: given.pop(parameter.name) for parameter in self.parameters}
        )


def shell_command(function: Callable[..., None]) -> Callable[..., None]:
    """A function that typer can read, of one whose parameters may be option objects.

    A parameter that is annotated with an `Options` class gets the object, one with `Fields` the given
    values; the others are typer's own.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Fields | TargetFields | _Group] = {}
    for parameter in inspect.signature(function).parameters.values():
        group = _group_of(hints[parameter.name])
        if group is None:
            parameters.append(_keyword(parameter.name, hints[parameter.name], parameter.default))
        else:
            groups[parameter.name] = group
            parameters += group.parameters

    def command(**given: Any) -> None:
        taken = {name: group.take(given) for name, group in groups.items()}
        function(**taken, **given)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {field.name: field.annotation for field in parameters}
    return command


def _group_of(hint: Any) -> Fields | TargetFields | _Group | None:
    if isinstance(hint, type) and issubclass(hint, Options):
        return _Group(hint)
    return next(
        (
            metadata
            for metadata in get_args(hint)[1:]
            if isinstance(metadata, Fields | TargetFields)
        ),
        None,
    )


def _info(hint: Any, text: str) -> Any:
    """The annotation of an option, with its help."""
    if get_origin(hint) is not Annotated:
        return Annotated[hint, typer.Option(help=text)]
    kind, *extras = get_args(hint)
    infos = [copy.copy(extra) for extra in extras if isinstance(extra, ParameterInfo)]
    for info in infos or [OptionInfo()]:
        info.help = info.help or text
        return Annotated[kind, info]
    return hint


def _keyword(name: str, hint: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=hint)
