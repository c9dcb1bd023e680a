"""Codes that reach Core AI's converter as they are held."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.backends.coreai import backend
from graphopt.errors import LoweringError
from graphopt.exclusive import exclusive
from graphopt.palettization import KMeansPalettizerConfig

pytestmark = [pytest.mark.integration, pytest.mark.coreai]


def saved(model: nn.Module, x: torch.Tensor, weight: dict[str, Any], path: Path) -> bytes:
    config = KMeansPalettizerConfig.from_dict(
        {"global_config": {"op_state_spec": {"weight": weight}}}
    )
    program = graphopt.compress(model, (x,), config, dynamic_shapes=None, progress=False)
    graphopt.lower(program, "coreai").save(path, verify=False)
    return b"".join(file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file())


@pytest.mark.parametrize(
    ("weight", "columns"),
    [
        ({"n_bits": 1}, 256),
        ({"n_bits": 2}, 256),
        ({"n_bits": 3}, 256),
        ({"n_bits": 4}, 256),
        ({"n_bits": 6}, 256),
        ({"n_bits": 6}, 258),
        ({"n_bits": 8}, 256),
        ({"n_bits": 4, "cluster_dim": 2}, 512),
        ({"n_bits": 4, "granularity": {"type": "per_grouped_channel", "group_size": 16}}, 256),
    ],
)
def test_the_asset_is_what_unpacked_codes_give(
    weight: dict[str, Any],
    columns: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(columns, 274)).eval(), torch.randn(2, columns)
    packed = saved(model, x, weight, tmp_path / "packed.aimodel")
    monkeypatch.setattr(backend, "packed_codes_taken", nullcontext)
    assert packed == saved(model, x, weight, tmp_path / "unpacked.aimodel")


def test_nothing_is_packed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coreai_torch._compression import _intx

    def refuse(*_: Any) -> None:
        raise AssertionError("codes were unpacked and packed")

    monkeypatch.setattr(_intx, "pack_uintx", refuse)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 256)).eval(), torch.randn(2, 256)
    assert saved(model, x, {"n_bits": 4}, tmp_path / "net.aimodel")
    monkeypatch.setattr(backend, "packed_codes_taken", nullcontext)
    with pytest.raises((LoweringError, AssertionError), match="unpacked and packed"):
        saved(model, x, {"n_bits": 4}, tmp_path / "again.aimodel")


def test_masks_of_pruned_weights_go_its_own_way() -> None:
    """It asks for those by names of arguments, and by the class that both kinds of codes have."""
    from coreai_torch._compression._intx import UintxTensor

    mask = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1], dtype=torch.uint8)
    with exclusive(), backend.packed_codes_taken():
        packed = UintxTensor.from_unpacked(unpacked=mask, nbits=1)
    assert packed.elem.tolist() == [0b10001101]
