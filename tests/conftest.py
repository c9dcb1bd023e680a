"""Markers that need a package are skipped, with the reason, where it is absent."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

_NEEDS = {
    "coreai": ("coreai_torch", "coreai"),
    "coreml": ("coremltools", "coreml"),
    "executorch": ("executorch", "executorch"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
