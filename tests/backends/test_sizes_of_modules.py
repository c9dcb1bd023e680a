"""With which sizes a module is captured that is lowered in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends import lowering
from graphopt.errors import CaptureError, InputError

SUFFIXES = {"coreai": "aimodel", "coreml": "mlpackage", "executorch": "pte", "torch": "pt2"}


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def _saved(artifact: Any, target: str, folder: Path, rows: int) -> None:
    """Save it where it computes what PyTorch does for an input of so many rows."""
    artifact.save(folder / f"net.{SUFFIXES[target]}", verify=[(torch.randn(rows, 16),)])


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sizes that each export of a model was asked for."""
    asked: list[Any] = []
    export = torch.export.export

    def noted(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, nn.Sequential):
            asked.append(kwargs.get("dynamic_shapes"))
        return export(model, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", noted)
    return asked


@pytest.mark.parametrize("target", ["coreai", "coreml", "executorch"])
def test_a_module_for_one_size_is_exported_once_and_with_it(
    target: str, exports: list[Any], tmp_path: Path
) -> None:
    artifact = graphopt.lower(_net(), target, torch.randn(3, 16))
    assert exports == [None]
    _saved(artifact, target, tmp_path, rows=3)


@pytest.mark.parametrize("options", [{"shapes": {"input": {0: (1, 8)}}}, {"shapes": "open"}])
def test_a_module_for_several_sizes_is_exported_with_open_ones(
    options: dict[str, Any], exports: list[Any], tmp_path: Path
) -> None:
    artifact = graphopt.lower(_net(), "coreai", torch.randn(3, 16), **options)
    assert None not in exports
    _saved(artifact, "coreai", tmp_path, rows=5)


def test_a_pt2_file_of_a_module_takes_other_sizes(tmp_path: Path) -> None:
    artifact = graphopt.lower(_net(), "torch", torch.randn(3, 16))
    _saved(artifact, "torch", tmp_path, rows=5)


def test_where_fixed_sizes_cannot_be_exported_open_ones_are_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    capture: Any = lowering.capture

    def refusing(model: Any, args: Any, kwargs: Any, shapes: Any = "auto") -> Any:
        asked.append(shapes)
        if shapes is None:
            raise CaptureError("not with these")
        return capture(model, args, kwargs, shapes)

    monkeypatch.setattr(lowering, "capture", refusing)
    _saved(graphopt.lower(_net(), "coreai", torch.randn(3, 16)), "coreai", tmp_path, rows=3)
    assert asked == [None, "auto"]


class _Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(7, 7)


def test_an_example_that_the_module_refuses_is_said_to_be_one() -> None:
    with pytest.raises(InputError, match="fails on the example inputs"):
        graphopt.lower(_Fails(), "coreai", torch.randn(3, 16))


def test_compress_fixes_the_sizes_of_the_example_where_asked_to() -> None:
    net, x = _net(), torch.randn(3, 16)
    fixed = graphopt.compress(net, x, dynamic_shapes=None)
    opened = graphopt.compress(net, x)
    assert fixed.provenance.static_dims == ("input[0] = 3", "input[1] = 16")
    assert opened.provenance.static_dims == ("input[1] = 16",)
    assert torch.equal(fixed.module()(x), opened.module()(x))
    with pytest.raises(InputError, match="do not fit the captured graph"):
        fixed.module()(torch.randn(5, 16))
    assert [row.snr_db for row in fixed.report()] == [row.snr_db for row in opened.report()]


def test_compress_takes_the_dimensions_that_torch_export_does() -> None:
    batch = torch.export.Dim("batch", min=2, max=9)
    program = graphopt.compress(_net(), torch.randn(3, 16), dynamic_shapes=({0: batch},))
    assert program.module()(torch.randn(5, 16)).shape == (5, 8)
    with pytest.raises(InputError):
        program.module()(torch.randn(10, 16))
