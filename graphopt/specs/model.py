"""The pydantic base of specs and configs: frozen or checked on assignment, errors of our own."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from graphopt.errors import ConfigError

__all__ = ["SpecModel", "config_error"]


_Problem = tuple[tuple[str | int, ...], str]


def config_error(title: str, error: ValidationError) -> ConfigError:
    """Turn pydantic's error into ours: one line per problem, each with the path of the wrong key."""
    problems: list[_Problem] = []
    for problem in error.errors(include_url=False):
        path = tuple(part for part in problem["loc"] if part not in _UNION_TAGS)
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError) and cause.problems:
            problems += [((*path, *inner), text) for inner, text in cause.problems]
            continue
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key"
        elif cause is None and not isinstance(problem["input"], dict):
            message += f", got {problem['input']!r}"
        problems.append((path, message))
    lines = [f"{'.'.join([title, *map(str, path)])}: {text}" for path, text in problems]
    return ConfigError("\n".join(lines), tuple(problems))


_UNION_TAGS = ("per_tensor", "per_grouped_channel", "per_channel", "per_block")


class SpecModel(BaseModel):
    """A frozen value; unknown keys are refused and named with their path."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

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
            raise config_error(type(self).__name__, error) from None

    # values within others are checked as mappings, whose keys may be anything, not as keywords
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise config_error(type(self).__name__, error) from None
