"""Codes lie in memory once: what was prepared, its programs and its finalized modules share them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.lowering import convert_for
from graphopt.ir.packed_codes import packed_of
from graphopt.palettization import KMeansPalettizer


@pytest.fixture(scope="module")
def palettizer() -> KMeansPalettizer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    made = KMeansPalettizer(model)
    made.prepare((torch.randn(2, 256),))
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


def test_modules_for_a_target_share_the_codes_that_it_unpacks(palettizer: KMeansPalettizer) -> None:
    pytest.importorskip("coreai_torch")
    program = palettizer.program()
    packed = places(program.graph_module.state_dict(), torch.uint8)
    module = convert_for(program, "coreai")
    again = graphopt.capture(module, program.example_args).graph_module.state_dict()
    for state in (module.state_dict(), again):
        codes = [value for value in state.values() if value.dtype is torch.uint8]
        assert [value.shape for value in codes] == [(512, 256), (256, 512)]
        assert {packed_of(value, 4).untyped_storage().data_ptr() for value in codes} == packed
