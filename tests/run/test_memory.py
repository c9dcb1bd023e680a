"""Memory that is given back."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

_HOLES = """
import gc
import torch
from graphopt.run.memory import give_back

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

torch.empty(31 << 20, dtype=torch.uint8)  # from here glibc keeps what is smaller
arrays = [torch.ones(2 << 20, dtype=torch.uint8) for _ in range(64)]
kept = arrays[::2]
torch.ones(1000)
before = resident()
del arrays
gc.collect()
give_back()
after = resident()
assert all(int(each[-1]) == 1 for each in kept)
give_back()
print(before - after)
"""


def test_memory_between_arrays_that_stay_is_given_back():
    freed = subprocess.run(
        [sys.executable, "-c", _HOLES], check=True, capture_output=True, text=True
    ).stdout
    assert int(freed) > 48 << 20


def test_a_system_without_such_a_call_goes_on(monkeypatch):
    from graphopt.run import memory

    monkeypatch.setattr(memory, "_trim", lambda: None)
    memory.give_back()
