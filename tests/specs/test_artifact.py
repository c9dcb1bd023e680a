"""Sizes as people write them, and the file that a compression is for."""

from __future__ import annotations

import pytest

from graphopt.errors import ConfigError
from graphopt.specs.artifact import ArtifactSpec, read_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1500, 1500),
        ("1500", 1500),
        ("1,500 bytes", 1500),
        ("48KB", 48_000),
        ("48 kb", 48_000),
        ("48KiB", 49_152),
        ("1.5 MB", 1_500_000),
        ("1.5MiB", 1_572_864),
        (".5GB", 500_000_000),
        ("2 GiB", 2_147_483_648),
    ],
)
def test_kilobytes_are_decimal_and_kibibytes_binary(text: str | float, size: int) -> None:
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["", "KB", "4 kilo", "-3", "1e3", "nan", float("nan"), -1])
def test_what_is_no_size_is_refused(text: str | float) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        read_bytes(text)


def test_options_that_no_file_holds_are_named() -> None:
    with pytest.raises(ConfigError, match="'ignored_ops' cannot be kept"):
        ArtifactSpec(backend="coreai", lowering={"precision": "float16", "ignored_ops": [len]})


def test_a_budget_is_positive() -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        ArtifactSpec(backend="coreai", max_bytes=0)
