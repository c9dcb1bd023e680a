"""Layers that share inputs are fitted side by side, and come out as one after the other."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import pytest
import torch
from helpers.pools import Immediate, processes, threads
from torch import Tensor, nn

import graphopt
from graphopt.analysis.matrix_form import LooseUse, WeightUse, weight_uses
from graphopt.analysis.weights import find_weights
from graphopt.fitting import integer_fit, output_fit
from graphopt.ir.program import Program
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.quantization import QuantizerConfig


class Block(nn.Module):
    """Three layers of the same input, one behind them, and two that are summed up."""

    def __init__(self) -> None:
        super().__init__()
        names = ("query", "key", "value", "out", "left", "right")
        for name in names:
            self.add_module(name, nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.query(x).sigmoid() * self.key(x).tanh() + self.value(x).relu()
        y = x + self.out(mixed)
        return self.left(y) + self.right(y)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return graphopt.capture(Block().eval(), (torch.randn(8, 16),))


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(8, 16) for _ in range(3)]


def tables(**fields: Any) -> KMeansPalettizerConfig:
    spec = PalettizationSpec(algorithm="gptq", **fields)
    module = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    return KMeansPalettizerConfig(global_config=module)


def configs() -> dict[str, Any]:
    return {
        "tables": tables(n_bits=3),
        "vectors": tables(n_bits=3, cluster_dim=2),
        "integers": QuantizerConfig.presets.w4(),
        "integers, activations": QuantizerConfig.presets.w8a8(),
    }


def fitted(program: Program, data: Sequence[Tensor], config: Any, **options: Any) -> dict[str, Any]:
    made = graphopt.compress(program, None, config, calibration_data=data, **options)
    return made.graph_module.state_dict()


@pytest.mark.parametrize("name", list(configs()))
@pytest.mark.parametrize("pool", [threads, Immediate])
def test_fits_do_not_depend_on_the_executor(
    program: Program, data: list[Tensor], name: str, pool: Callable[[], Executor]
) -> None:
    expected = fitted(program, data, configs()[name])
    with pool() as executor:
        found = fitted(program, data, configs()[name], executor=executor)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.integration
def test_processes_find_the_same(program: Program, data: list[Tensor]) -> None:
    with processes() as executor:
        for config in configs().values():
            expected = fitted(program, data, config)
            found = fitted(program, data, config, executor=executor)
            assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("module", "name"), [(output_fit, "tables"), (integer_fit, "integers")])
def test_a_layer_waits_for_what_its_own_fit_makes_up_for(
    program: Program,
    data: list[Tensor],
    module: Any,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups: list[list[str]] = []
    together = module.fitted_together

    def noted(*args: Any) -> list[WeightUse]:
        found: list[WeightUse] = together(*args)
        groups.append([str(use.node.args[use.position]) for use in found])
        return found

    monkeypatch.setattr(module, "fitted_together", noted)
    side_by_side = fitted(program, data, configs()[name])
    assert [len(group) for group in groups] == [3, 1, 1, 1]
    monkeypatch.setattr(module, "fitted_together", lambda first, *_: [first])
    alone = fitted(program, data, configs()[name])
    assert all(torch.equal(side_by_side[key], alone[key]) for key in alone)


def test_palettizers_calibrate_on_the_executor_of_prepare(data: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = Block().eval()
    programs = []
    for executor in (None, Immediate()):
        palettizer = KMeansPalettizer(model, configs()["tables"])
        palettizer.prepare((data[0],), executor=executor)
        palettizer.calibrate(data)
        programs.append(palettizer.program().graph_module.state_dict())
    here, there = programs
    assert all(torch.equal(there[key], here[key]) for key in here)
    assert isinstance(executor, Immediate)
    assert len(executor.sent) == 2 * 6  # clustered, then fitted


def test_uses_travel_without_their_graph() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.permute(2, 0, 1).reshape(4, 6).to(torch.float32)

    gm = graphopt.capture(Turned(), (torch.randn(5, 4),)).graph_module
    (weight,) = find_weights(gm)
    (use,) = weight_uses(gm, [weight])[weight.name]
    there = pickle.loads(pickle.dumps(use.loose()))
    assert isinstance(there, LooseUse)
    matrix = use.matrix(weight.tensor)
    assert torch.equal(there.matrix(weight.tensor), matrix)
    assert torch.equal(there.pull_back(matrix, weight.tensor.shape), weight.tensor)
