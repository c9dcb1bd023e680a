"""What runs on a device runs there and nowhere else: on one whose tensors mix with no others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = (
    "numerics/test_device.py",
    "compressors/test_tuning_on_devices.py",
    "compressors/test_training_on_devices.py",
)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("double", "which"),
    [
        pytest.param(True, "pretended", id="float64", marks=pytest.mark.slow),
        # what takes the longest takes no other way there
        pytest.param(True, "pretended and not feedback", id="float64, some"),
        pytest.param(False, "pretended", id="no float64"),
    ],
)
def test_a_device_of_its_own_kind_computes_the_same(double: bool, which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "helpers.pretended_device"]
    command += ["-k", which, "-m", "not slow", *(str(TESTS / name) for name in FILES)]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    given = {**os.environ, "PYTHONPATH": path} | ({} if double else {"PRETEND_NO_DOUBLE": "1"})
    given.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, env=given, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
