"""Markers that need a package are skipped, with the reason, where it is absent."""

from __future__ import annotations

import importlib.util

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
