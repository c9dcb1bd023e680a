from __future__ import annotations

import logging
import warnings

import pytest

from graphopt.cli.messages import grouped_warnings
from graphopt.errors import ConfigWarning


def test_warnings_of_a_kind_are_one_line_with_a_count(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("graphopt.somewhere")
    with grouped_warnings():
        for name in ("a.weight", "b.weight", "c.weight", "c.weight"):
            log.warning("%s: group size %d does not divide", name, 3)
        for layer in (1, 2):
            warnings.warn(
                f"layers.{layer}.weight keeps {layer} tables", ConfigWarning, stacklevel=1
            )
        log.warning("something else")
        log.info("not this")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "warning: a.weight: group size 3 does not divide (and 2 more of this kind)",
        "warning: layers.1.weight keeps 1 tables (and 1 more of this kind)",
        "warning: something else",
    ]


def test_other_packages_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with grouped_warnings():
        warnings.warn("old", FutureWarning, stacklevel=1)
        warnings.warn("note", UserWarning, stacklevel=1)
    assert capsys.readouterr() == ("", "")


def test_what_was_set_before_is_set_afterwards() -> None:
    own, before = logging.getLogger("graphopt"), warnings.showwarning
    handlers, propagates = list(own.handlers), own.propagate
    with pytest.raises(ValueError, match="mine"), grouped_warnings():
        raise ValueError("mine")
    assert (own.handlers, own.propagate, warnings.showwarning) == (handlers, propagates, before)
