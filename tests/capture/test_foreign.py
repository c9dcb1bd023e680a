"""What a file that does not load lacks is named."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from graphopt.capture.foreign import missing_module


def archive(path: Path, text: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("net/models/model.json", text)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('"torch.ops.aten.add.Tensor", "torch.ops.nowhere.mix.default"', "torch.ops.nowhere.mix"),
        ('"torch.ops.aten.add.Tensor"', None),
    ],
)
def test_an_op_that_nothing_registered_is_named(
    tmp_path: Path, text: str, said: str | None
) -> None:
    found = missing_module(archive(tmp_path / "net.pt2", text))
    assert (said in found and "import the module" in found) if said else found == ""
