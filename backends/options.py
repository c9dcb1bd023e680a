"""Options of targets: frozen values, read from the keywords of a call or from the shell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, TypeVar

from graphopt.errors import LoweringError

__all__ = [
    "LoweringKeywords",
    "ShellOption",
    "TargetOptions",
    "check_precision",
    "in_shell",
    "read_options",
    "shell_options",
]


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """What `lower` of a target takes beside the program; every field has a default."""

    @property
    def float_type(self) -> str:
        """Float type that an artifact computes in."""
        return str(getattr(self, "precision", "float32"))


class LoweringKeywords(TypedDict, total=False):
    """The options of all targets as keywords of a call; which of them a target takes, its options say."""

    precision: Literal["float32", "float16"]
    shapes: Any
    dynamic: bool
    ignored_ops: Any
    calibration_data: Iterable[Any] | None
    minimum_deployment_target: str
    delegate: str
    tables: str
    weights: str
    matmul: str
    kernels: str
    stack_traces: bool


OptionsT = TypeVar("OptionsT", bound=TargetOptions)
Choices = tuple[str, ...] | Callable[[], tuple[str, ...]]


@dataclass(frozen=True)
class ShellOption:
    """How the shell offers an option.

    Attributes:
        help: For people.
        choices: The values that it may have.
    """

    help: str
    choices: tuple[str, ...]


def in_shell(choices: Choices, text: str) -> dict[str, Any]:
    """Metadata of a field that the shell offers, too; others can be given in Python alone.

    Args:
        choices: Its values, or what lists them once they are asked for.
        text: What the shell says of it.
    """
    return {"choices": choices, "help": text}


def shell_options(kind: type[TargetOptions]) -> dict[str, ShellOption]:
    """Fields that the shell offers, by name."""
    offered = {}
    for field in fields(kind):
        if "help" in field.metadata:
            choices = field.metadata["choices"]
            known = choices() if callable(choices) else choices
            offered[field.name] = ShellOption(field.metadata["help"], known)
    return offered


def read_options(kind: type[OptionsT], name: str, given: Mapping[str, Any]) -> OptionsT:
    """Options from the keywords of a call.

    Args:
        kind: The target's options.
        name: The target's name in messages.
        given: Option → value; the others have their defaults.

    Raises:
        LoweringError: There is no such option, or it cannot have that value.
    """
    known = [field.name for field in fields(kind)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        verb = "is" if len(known) == 1 else "are"
        listed = ", ".join(repr(option) for option in sorted(known))
        raise LoweringError(f"{name} has no option {unknown}; there {verb} {listed or 'none'}")
    return kind(**given)


def check_precision(precision: str) -> None:
    """Refuse what is no type to compute in.

    Raises:
        LoweringError: It is neither "float32" nor "float16".
    """
    if precision not in ("float32", "float16"):
        raise LoweringError(f"precision must be 'float32' or 'float16', got {precision!r}")
