"""Weights with many zeros are stored as values and a mask, where a spec asks for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.palettization import KMeansPalettizerConfig, ModuleKMeansPalettizerConfig
from graphopt.passes import DetectSparsity
from graphopt.specs import PalettizationSpec


def _program(share: float) -> graphopt.Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 4, bias=False)).eval()
    with torch.no_grad():
        weight = model[0].weight
        kept = weight.abs() > weight.abs().flatten().quantile(share) if share else weight != 0
        weight.mul_(kept)
    return graphopt.capture(model, (torch.randn(2, 16),))


def _config(threshold: float | None) -> KMeansPalettizerConfig:
    spec = PalettizationSpec(n_bits=2, sparsity_detection_threshold=threshold)
    module = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    return KMeansPalettizerConfig(global_config=module)


@pytest.mark.parametrize(
    ("share", "threshold", "found"),
    [(0.5, 0.4, True), (0.5, 0.6, False), (0.0, 0.0, False), (0.25, 0.0, True), (0.5, None, False)],
)
def test_zeros_are_counted(share: float, threshold: float | None, found: bool) -> None:
    program = _program(share)
    inputs = program.example_args
    want = program.module()(*inputs)
    DetectSparsity(_config(threshold))(program.graph_module)
    program.graph_module.graph.lint()
    ops = [str(node.target) for node in program.graph_module.graph.nodes]
    assert ("graphopt.sparse_to_dense.default" in ops) == found
    assert torch.equal(program.module()(*inputs), want)


def test_tables_are_for_what_is_not_zero() -> None:
    program = _program(0.5)
    zeros = program.graph_module.get_parameter("0.weight") == 0
    pair = (program, {"palettization": _config(0.4)})
    compressed = graphopt.compress(*[pair[0], None, pair[1]], progress=False)
    dense = dict(_weights(compressed))["0.weight"]
    assert torch.equal(dense == 0, zeros)
    assert len(dense[~zeros].unique()) == 4


def _weights(program: graphopt.Program) -> list[tuple[str, torch.Tensor]]:
    from graphopt.passes import DecodeWeights

    copy = program.copy()
    DecodeWeights()(copy.graph_module)
    return list(copy.graph_module.state_dict().items())
