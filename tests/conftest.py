"""What holds for every test: markers of extras, the order of files, threads, the seed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

_NEEDS = {
    "coreai": ("coreai_torch", "coreai"),
    "coreml": ("coremltools", "coreml"),
    "executorch": ("executorch", "executorch"),
}
# files that take longest begin first, so that no worker is left with one of them at the end
_LONG = (
    "test_op_sweep",
    "test_examples",
    "test_architectures",
    "test_compressed_tables",
    "test_analysis",
)


def pytest_configure() -> None:
    """Each worker of several has one thread: nets this small only lose by more."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs a package that is absent; order the files."""
    items.sort(key=lambda item: item.path.stem not in _LONG)
    for item in items:
        for marker, (module, extra) in _NEEDS.items():
            if item.get_closest_marker(marker) and importlib.util.find_spec(module) is None:
                reason = f"{module} is not installed (extra '{extra}')"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For nets so small that more threads only lose, on a busy machine by far."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
