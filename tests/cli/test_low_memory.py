"""What `--low-memory` takes does not grow with the model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "low_memory.py"


def peak(gib: float) -> float:
    """GiB in memory at most, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(BENCHMARK), str(gib)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"peak_gib=([\d.]+)", done.stdout)
    assert found is not None, done.stdout
    return float(found[1])


@pytest.mark.slow
def test_eight_times_the_weights_take_the_same_memory() -> None:
    assert peak(0.5) < peak(0.0625) + 0.1
