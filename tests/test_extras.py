from __future__ import annotations

import gc
import logging
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from graphopt.errors import MissingDependencyError
from graphopt.extras import require
from graphopt.loading import uncollected

NOISY = """
import logging, os, sys, warnings
print("printed")
print("to errors", file=sys.stderr)
os.write(2, b"from compiled parts")
warnings.warn("old")
logging.warning("logged")
VALUE = 3
"""


def test_what_a_package_writes_while_it_is_imported_is_kept_from_the_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "noisy_package.py").write_text(NOISY)
    monkeypatch.syspath_prepend(tmp_path)
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    assert require("noisy_package", "some").VALUE == 3
    assert capfd.readouterr() == ("", "")
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)
    print("shown")
    assert capfd.readouterr().out == "shown\n"
    assert require("noisy_package", "some") is sys.modules["noisy_package"]


def test_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(MissingDependencyError, match=r"pip install 'graphopt\[some\]'"):
        require("no_such_package", "some")


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_of_garbage_is_as_before_after_imports(collects: bool) -> None:
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with suppress(ImportError), uncollected():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()
