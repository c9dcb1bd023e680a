"""Codes lie in memory once: what was prepared, its programs and its finalized modules share them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.backends.lowering import convert_for
from graphopt.palettization import KMeansPalettizer


@pytest.fixture(scope="module")
def palettizer() -> KMeansPalettizer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    made = KMeansPalettizer(model)
    made.prepare((torch.randn(2, 16),))
    return made


def places(tensors: dict[str, Tensor], dtype: torch.dtype) -> set[int]:
    return {
        value.untyped_storage().data_ptr() for value in tensors.values() if value.dtype is dtype
    }


def test_programs_share_codes_and_nothing_else(palettizer: KMeansPalettizer) -> None:
    first, second = (palettizer.program().graph_module.state_dict() for _ in range(2))
    assert places(first, torch.uint8) == places(second, torch.uint8)
    assert len(places(first, torch.uint8)) == 2
    assert not places(first, torch.float32) & places(second, torch.float32)


def test_modules_for_a_target_share_the_codes_that_it_wants(palettizer: KMeansPalettizer) -> None:
    pytest.importorskip("coreai_torch")
    program = palettizer.program()
    made = [convert_for(program, "coreai").state_dict() for _ in range(2)]
    first, second = (places(state, torch.uint8) for state in made)
    assert first == second
    assert len(first) == 2
    assert not first & places(program.graph_module.state_dict(), torch.uint8)
