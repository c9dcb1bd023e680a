from __future__ import annotations

import pytest

from graphopt.errors import InputError
from graphopt.specs.byte_sizes import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12MB", 12_000_000),
        ("1.5 mb", 1_500_000),
        ("400 KiB", 400 * 1024),
        ("2GiB", 2 * 1024**3),
        ("10_000", 10_000),
        ("1,250 kB", 1_250_000),
        ("3e4 B", 30_000),
        (2048, 2048),
        (5e6, 5_000_000),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str | float, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "12 MBit", "-3KB", "0", "1e400", "12 MB 3", "1,2 KB"])
def test_what_is_no_size_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(InputError, match="size") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value) or text.strip() in str(caught.value)
