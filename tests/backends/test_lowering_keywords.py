"""The keywords that calls of `lower` are typed with."""

from __future__ import annotations

from dataclasses import fields

from graphopt.backends import load_backend
from graphopt.backends.options import LoweringKeywords
from graphopt.backends.registry import targets


def test_keywords_are_the_options_of_all_targets() -> None:
    known = {field.name for target in targets() for field in fields(load_backend(target).options)}
    assert set(LoweringKeywords.__annotations__) == known
