"""What holds for every test: markers of extras, the order of files, threads, the seed."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from graphopt.backends.registry import targets

_EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
# a target's name marks what needs its toolchain
_NEEDS = {target.value: target.extra for target in targets() if target.extra in _EXTRAS}
# files that take longest begin first, so that no worker is left with one of them at the end
_LONG = (
    "test_op_sweep",
    "test_examples",
    "test_architectures",
    "test_compressed_tables",
    "test_analysis",
)


def pytest_configure(config: pytest.Config) -> None:
    """Targets are markers; each worker of several has one thread: nets this small only lose by more."""
    for name, extra in _NEEDS.items():
        config.addinivalue_line("markers", f"{name}: needs the extra '{extra}'")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a module draws as it is imported depends on no module before it."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs a package that is absent; order the files."""
    items.sort(key=lambda item: item.path.stem not in _LONG)
    absent = {name: lacking for name, extra in _NEEDS.items() if (lacking := _lacking(extra))}
    for item in items:
        for marker, package in absent.items():
            if item.get_closest_marker(marker):
                reason = f"{package} is not installed (extra '{_NEEDS[marker]}')"
                item.add_marker(pytest.mark.skip(reason=reason))


def _lacking(extra: str) -> str:
    """The first package of an extra that is not installed, or ""."""
    for requirement in _EXTRAS[extra]:
        name = requirement.partition("=")[0].rstrip("<>~!")
        try:
            version(name)
        except PackageNotFoundError:
            return str(name)
    return ""


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
