"""ExpandTables, IntegersToTables, TablesToIntegers: tables and what stands for them."""

from __future__ import annotations

import pytest
import torch
from helpers.linear_nets import X, annotate, captured, ops

from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.ir.annotations import notes_of
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import Editor
from graphopt.numerics.packing import pack
from graphopt.passes import (
    AnnotatePalettization,
    ExpandTables,
    IntegersToTables,
    PalettizeWeights,
    TablesToIntegers,
)
from graphopt.passes.pass_manager import run_passes

LOOKUP, SCALED = "graphopt.lut_to_dense.default", "graphopt.shift_scale.default"


@pytest.fixture
def gm() -> CapturedModule:
    torch.manual_seed(0)
    return captured()


@pytest.fixture
def tables(gm: CapturedModule) -> CapturedModule:
    run_passes(gm, [annotate(), PalettizeWeights()])
    return gm


@pytest.fixture
def integer_tables(gm: CapturedModule) -> CapturedModule:
    config = KMeansPalettizerConfig.model_validate(
        {
            "global_config": {
                "op_state_spec": {"weight": {"n_bits": 4, "lut_qspec": {"dtype": "int8"}}}
            }
        }
    )
    run_passes(gm, [AnnotatePalettization(config), PalettizeWeights()])
    return gm


def with_integers(gm: CapturedModule, storage: str, bits: int) -> torch.Tensor:
    """Let the first layer read packed integers; returns their values."""
    edit = Editor(gm)
    node = next(n for n in edit.constants() if n.target == "fc.weight")
    signed = storage.startswith("int")
    low = -(2 ** (bits - 1)) if signed else 0
    values = torch.randint(low, low + 2**bits, (8, 6))
    codes = pack((values % 2**bits).to(torch.uint8).flatten(), bits)
    scale = torch.rand(8, 1) + 0.5
    data = edit.constant("fc.weight_quantized", codes, like=node)
    factor = edit.constant("fc.weight_factor", scale, like=node)
    made = edit.call(
        torch.ops.graphopt.shift_scale.default,
        *(data, factor, None, storage, [8, 6], torch.float32),
        like=node,
    )
    edit.replace(node, made)
    gm.recompile()
    return values * scale


def test_a_table_becomes_the_weight_that_it_stands_for(tables: CapturedModule) -> None:
    want = tables(X)
    state = tables.state_dict()
    codes, lut = state["out.weight_indices"], state["out.weight_lut"]
    assert ExpandTables()(tables).modified
    assert ops(tables) == ["aten.linear.default", "aten.relu.default", "aten.linear.default"]
    assert not any("_lut" in name or "_indices" in name for name in tables.state_dict())
    assert torch.equal(tables(X), want)
    index = torch.stack([codes & 15, codes >> 4], -1).flatten()[: 4 * 8].long()
    assert torch.equal(tables.state_dict()["out.weight"], lut.flatten()[index].reshape(4, 8))
    notes = notes_of(tables)
    assert [note.partition(":")[0] for note in notes] == ["fc.weight", "out.weight"]


def test_a_graph_without_tables_stays(gm: CapturedModule) -> None:
    assert not ExpandTables()(gm).modified
    assert notes_of(gm) == ()


def test_expanding_again_changes_nothing(tables: CapturedModule) -> None:
    ExpandTables()(tables)
    notes = notes_of(tables)
    assert not ExpandTables()(tables).modified
    assert notes_of(tables) == notes


@pytest.mark.parametrize(("storage", "bits"), [("int6", 6), ("uint3", 3)])
def test_integers_become_codes_of_a_table_of_integers(
    gm: CapturedModule, storage: str, bits: int
) -> None:
    dense = with_integers(gm, storage, bits)
    assert IntegersToTables()(gm).modified
    assert ops(gm)[:2] == [LOOKUP, SCALED]
    hidden = torch.relu(X @ dense.T + gm.state_dict()["fc.bias"])
    torch.testing.assert_close(gm(X), hidden @ gm.state_dict()["out.weight"].T)
    lut = gm.state_dict()["fc.weight_lut"].flatten()
    assert len(lut) == 2**bits
    assert lut.dtype == (torch.int8 if storage.startswith("int") else torch.uint8)
    assert not IntegersToTables()(gm).modified


def test_integers_of_types_that_are_not_asked_for_stay(gm: CapturedModule) -> None:
    with_integers(gm, "int4", 4)
    assert not IntegersToTables()(gm).modified
    assert LOOKUP not in ops(gm)
    assert IntegersToTables(frozenset({"int4"}))(gm).modified


def test_integer_tables_become_integers(integer_tables: CapturedModule) -> None:
    want = integer_tables(X)
    assert LOOKUP in ops(integer_tables)
    assert TablesToIntegers()(integer_tables).modified
    assert LOOKUP not in ops(integer_tables)
    assert ops(integer_tables).count(SCALED) == 2
    torch.testing.assert_close(integer_tables(X), want)
    assert not TablesToIntegers()(integer_tables).modified


def test_tables_of_floats_stay(tables: CapturedModule) -> None:
    before = ops(tables)
    assert not TablesToIntegers()(tables).modified
    assert ops(tables) == before


def test_tables_whose_readers_gain_nothing_stay(integer_tables: CapturedModule) -> None:
    before = ops(integer_tables)
    assert not TablesToIntegers(lambda weight, reader: False)(integer_tables).modified
    assert ops(integer_tables) == before
