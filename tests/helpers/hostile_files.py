"""Saved programs of which single members are exchanged, and what runs when such a file is believed."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Runs", "edited", "members", "program_of", "saved_net", "with_program"]

Json = dict[str, Any]


class _Net(nn.Module):
    """Open sizes, an einsum (a text argument), a buffer, a constant and a mapping of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("kept", torch.ones(4))
        self.constant = torch.ones(4)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> dict[str, Tensor]:
        y = self.linear(x) * self.kept + self.constant
        return {"y": torch.einsum("ij,kj->ik", y, more["z"]), "flat": x.reshape(-1)}


def saved_net(path: Path) -> Path:
    """A program with open sizes and guards, as `torch.export.save` writes it."""
    torch.manual_seed(0)
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(
        _Net(),
        (torch.randn(3, 4), {"z": torch.randn(5, 4)}),
        dynamic_shapes={"x": {0: auto}, "more": {"z": {0: auto}}},
        strict=False,
    )
    torch.export.save(exported, path)
    return path


def members(path: Path) -> dict[str, bytes]:
    """Name without the archive's folder → bytes."""
    with zipfile.ZipFile(path) as archive:
        return {m.filename.partition("/")[2]: archive.read(m) for m in archive.infolist()}


def program_of(path: Path) -> Json:
    """The JSON of the graph."""
    return json.loads(members(path)["models/model.json"])


def edited(path: Path, result: Path, changes: Mapping[str, bytes | None]) -> Path:
    """The archive with members exchanged, added or, where None, left out."""
    kept = {**members(path), **changes}
    with zipfile.ZipFile(result, "w") as archive:
        for name, content in kept.items():
            if content is not None:
                archive.writestr(f"m/{name}", content)
    return result


def with_program(path: Path, result: Path, change: Callable[[Json], None]) -> Path:
    """The archive with its graph changed in place by `change`."""
    program = copy.deepcopy(program_of(path))
    change(program)
    return edited(path, result, {"models/model.json": json.dumps(program).encode()})


class Runs:
    """What leaves a file behind when it runs: as an expression, and as a pickle."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    @property
    def code(self) -> str:
        return f"open({str(self.marker)!r}, 'w')"

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")

    @property
    def happened(self) -> bool:
        return self.marker.exists()
