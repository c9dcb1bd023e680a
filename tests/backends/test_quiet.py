from __future__ import annotations

import logging
import sys
import warnings

import pytest

from graphopt.backends.quiet import quiet


def test_a_converter_and_torch_below_it_say_nothing_and_errors_still_raise(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    torch_log = logging.getLogger("torch.utils._pytree")
    with quiet("some_converter"):
        logging.getLogger("some_converter.part").warning("a note")
        torch_log.warning("an enum")
        warnings.warn("old", FutureWarning, stacklevel=1)
        print("printed")
        print("a bar", file=sys.stderr)
    assert caplog.text == ""
    assert capsys.readouterr() == ("", "")
    torch_log.warning("behind it")
    assert "behind it" in caplog.text
    with pytest.raises(ValueError, match="mine"), quiet("some_converter"):
        raise ValueError("mine")
