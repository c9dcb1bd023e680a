from __future__ import annotations

import importlib
import typing
from dataclasses import dataclass, fields

import pytest

from graphopt.errors import ConfigError, OptionError
from graphopt.specs.options import Options, field_help

# modules that declare options, each with a TypedDict of the same fields beside it
MODULES = [
    "graphopt.compressors.options",
    "graphopt.numerics.feedback",
    "graphopt.report.page",
    "graphopt.search.mixed_precision.options",
    "graphopt.search.rdo.options",
]


@dataclass(frozen=True, kw_only=True)
class Cut(Options):
    """How a cake is cut.

    Attributes:
        pieces: How many, e.g. 8 (at least 1). More than 12
            are refused.
        knife: Name of the knife: `bread`, or None.
    """

    pieces: int = 8
    knife: str | None = None


def declared() -> list[tuple[type[Options], type]]:
    pairs = []
    for name in MODULES:
        module = importlib.import_module(name)
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Options) and value is not Options:
                keywords = value.__name__.replace("Options", "Keywords")
                pairs.append((value, getattr(module, keywords)))
    return pairs


def test_given_options_are_taken_and_others_have_their_defaults() -> None:
    assert Cut.of("cut", {"pieces": 3}) == Cut(pieces=3, knife=None)
    assert Cut.from_dict({}) == Cut()


def test_unknown_option_is_named_with_the_closest_one() -> None:
    with pytest.raises(OptionError, match=r"cut has no option 'peices'; did you mean 'pieces'\?"):
        Cut.of("cut", {"peices": 3})
    with pytest.raises(OptionError, match=r"'zzz'; it has \['pieces', 'knife'\]"):
        Cut.from_dict({"zzz": 3})


def test_unknown_option_is_an_error_of_calls_and_of_configs() -> None:
    assert issubclass(OptionError, TypeError)
    assert issubclass(OptionError, ConfigError)


def test_help_is_the_first_sentence_of_what_is_documented() -> None:
    assert field_help(Cut) == {
        "pieces": "How many, e.g. 8 (at least 1).",
        "knife": "Name of the knife: `bread`, or None.",
    }


@pytest.mark.parametrize(("options", "keywords"), declared())
def test_options_and_keywords_of_calls_agree(options: type[Options], keywords: type) -> None:
    assert typing.get_type_hints(options) == typing.get_type_hints(keywords)
    assert {field.name for field in fields(options)} == set(field_help(options))
