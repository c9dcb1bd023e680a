"""ExpandSparse, DequantizeToShiftScale: other forms of stored weights with the same values."""

from __future__ import annotations

import pytest
import torch
from helpers.linear_nets import Net, X, captured, ops

import graphopt
from graphopt.ir.annotations import notes_of
from graphopt.ir.captured_module import CapturedModule
from graphopt.numerics.packing import unpack
from graphopt.passes import AnnotatePruning, DequantizeToShiftScale, ExpandSparse, PruneWeights
from graphopt.passes.pass_manager import run_passes
from graphopt.pruning import MagnitudePrunerConfig
from graphopt.quantization import QuantizerConfig

SPARSE, SCALED = "graphopt.sparse_to_dense.default", "graphopt.shift_scale.default"
PER_CHANNEL = "quantized_decomposed.dequantize_per_channel.default"


@pytest.fixture
def sparse() -> CapturedModule:
    torch.manual_seed(0)
    gm = captured()
    run_passes(gm, [AnnotatePruning(MagnitudePrunerConfig()), PruneWeights()])
    return gm


@pytest.fixture
def integers() -> CapturedModule:
    torch.manual_seed(0)
    spec = {"dtype": "int8", "granularity": {"type": "per_channel", "axis": 0}}
    whole = {"op_state_spec": {"weight": spec}, "op_input_spec": None, "op_output_spec": None}
    config = QuantizerConfig.from_dict({"global_config": whole})
    return graphopt.compress(Net().eval(), X, config).graph_module


def test_sparse_values_become_the_dense_weight_that_mask_and_values_say(
    sparse: CapturedModule,
) -> None:
    state = sparse.state_dict()
    kept = unpack(state["fc.weight_mask"], 1, 48).bool()
    want = torch.zeros(48)
    want[kept] = state["fc.weight_values"]
    out = sparse(X)
    assert ops(sparse).count(SPARSE) == 2
    assert ExpandSparse()(sparse).modified
    assert SPARSE not in ops(sparse)
    assert torch.equal(sparse.state_dict()["fc.weight_dense"], want.reshape(8, 6))
    torch.testing.assert_close(sparse(X), out, rtol=0, atol=0)
    assert notes_of(sparse) == tuple(
        f"{name}.weight: stored as a dense weight with zeros" for name in ("fc", "out")
    )


def test_expanding_again_and_dense_weights_change_nothing(sparse: CapturedModule) -> None:
    assert not ExpandSparse()(captured()).modified
    ExpandSparse()(sparse)
    assert not ExpandSparse()(sparse).modified


def test_dequantized_channels_become_scaled_integers_of_the_same_values(
    integers: CapturedModule,
) -> None:
    state, out = integers.state_dict(), integers(X)
    data = next(value for name, value in state.items() if value.shape == (8, 6))
    scale = next(
        value
        for value in state.values()
        if value.shape == (8,) and value.ndim == 1 and bool((value > 0).all())
    )
    assert ops(integers).count(PER_CHANNEL) == 2
    assert DequantizeToShiftScale()(integers).modified
    assert PER_CHANNEL not in ops(integers)
    assert ops(integers).count(SCALED) == 2
    stored = integers.state_dict()
    bytes_of = stored["fc.weight_data"].view(torch.int8).reshape(8, 6)
    assert torch.equal(bytes_of, data)
    torch.testing.assert_close(stored["fc.weight_factor"].reshape(8), scale, rtol=0, atol=0)
    torch.testing.assert_close(integers(X), out, rtol=0, atol=1e-6)


def test_scaled_integers_stay_as_they_are(integers: CapturedModule) -> None:
    DequantizeToShiftScale()(integers)
    assert not DequantizeToShiftScale()(integers).modified
    assert not DequantizeToShiftScale()(captured()).modified
