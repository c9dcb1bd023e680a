"""The pydantic base of specs and configs: frozen or checked on assignment, errors of our own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from graphopt.errors import ConfigError

__all__ = ["SpecModel", "config_error"]


_Problem = tuple[tuple[str | int, ...], str]


def config_error(
    title: str, error: ValidationError, model: type[BaseModel] | None = None
) -> ConfigError:
    """Turn pydantic's error into ours: one line per problem, each with the path of the wrong key.

    Args:
        title: What the paths begin with.
        error: Pydantic's.
        model: What was to be read, so that unknown keys have the nearest known one.
    """
    problems: list[_Problem] = []
    for problem in error.errors(include_url=False):
        path = tuple(part for part in problem["loc"] if part not in _UNION_TAGS)
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError) and cause.problems:
            problems += [((*path, *inner), text) for inner, text in cause.problems]
            continue
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key" + _nearest(path, model)
        elif cause is None and not isinstance(problem["input"], dict):
            message += f", got {problem['input']!r}"
        problems.append((path, message))
    lines = [f"{'.'.join([title, *map(str, path)])}: {text}" for path, text in problems]
    return ConfigError("\n".join(lines), tuple(problems))


def _nearest(path: tuple[str | int, ...], model: type[BaseModel] | None) -> str:
    """The key that was probably meant by the last part of a path; "" where none is near."""
    hints: list[Any] = [] if model is None else [model]
    for part in path[:-1]:
        hints = [inner for hint in hints for inner in _inside(hint, str(part))]
    known = {name for hint in hints for kind in _models(hint) for name in kind.model_fields}
    near = difflib.get_close_matches(str(path[-1]), sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _inside(hint: Any, part: str) -> list[Any]:
    """Annotations of what stands under a key of a value that is annotated so."""
    fields = [kind.model_fields[part] for kind in _models(hint) if part in kind.model_fields]
    mappings = [one for one in _alternatives(hint) if get_origin(one) in (dict, Mapping)]
    return [field.annotation for field in fields] + [get_args(one)[1] for one in mappings]


def _models(hint: Any) -> list[type[BaseModel]]:
    return [
        one for one in _alternatives(hint) if isinstance(one, type) and issubclass(one, BaseModel)
    ]


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union, without what annotates them."""
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [inner for one in get_args(hint) for inner in _alternatives(one)]
    return [hint]


_UNION_TAGS = ("per_tensor", "per_grouped_channel", "per_channel", "per_block")


class SpecModel(BaseModel):
    """A frozen value; unknown keys are refused and named with their path."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, defer_build=True
    )

    @model_validator(mode="before")
    @classmethod
    def _keys_are_texts(cls, data: Any) -> Any:
        # keys become keywords, which Python wants to be texts
        strange = (
            [key for key in data if not isinstance(key, str)] if isinstance(data, dict) else []
        )
        if strange:
            raise ValueError(f"the key {strange[0]!r} is no text")
        return data

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise config_error(type(self).__name__, error, type(self)) from None

    # values within others are checked as mappings, whose keys may be anything, not as keywords
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise config_error(type(self).__name__, error) from None
