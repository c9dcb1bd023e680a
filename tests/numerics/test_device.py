"""Torch's way on a device comes out as the compiled code does: error feedback, moments, clustering."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.feedback_problems import damped, maps, objective, second_moment, uniform_tables
from torch import Tensor, nn

import graphopt
from graphopt.errors import InputError
from graphopt.numerics.device import chosen_device, computing_on, device_of
from graphopt.numerics.feedback import OrderedHessian, feedback_factor, fit_tables
from graphopt.numerics.kmeans1d import cluster_1d
from graphopt.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.quantization import QuantizerConfig

ROWS, COLUMNS = 32, 160  # more than a block of columns


def accelerators() -> list[Any]:
    """The CPU by torch, and every kind of accelerator, skipped where there is none."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    marks = {
        name: pytest.mark.skipif(not there, reason=f"there is no device {name!r} here")
        for name, there in here.items()
    }
    return ["cpu", *(pytest.param(name, marks=mark) for name, mark in marks.items())]


DEVICES = pytest.mark.parametrize("device", accelerators())


@DEVICES
@pytest.mark.parametrize("name", list(maps(ROWS, COLUMNS)))
def test_error_feedback_reaches_the_error_of_the_compiled_code(name: str, device: str) -> None:
    where, k = maps(ROWS, COLUMNS)[name]
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    hessian = second_moment(COLUMNS)
    count = int(where.rows.max() + where.columns.max()) + 1
    tables = uniform_tables(count, k, where.size)
    here = fit_tables(weight, hessian, tables, where, rounds=3, cycles=2)
    with computing_on(device):
        there = fit_tables(weight, hessian, tables, where, rounds=3, cycles=2)
    assert there.dense.device.type == "cpu"
    wide = damped(hessian, 0.01)
    found, expected = (objective(weight, fit.dense, wide) for fit in (there, here))
    assert found == pytest.approx(expected, rel=0.02)
    assert there.error == pytest.approx(found / objective(weight, 0 * weight, wide), rel=1e-3)
    # the values are those that the codes look up
    units = torch.from_numpy(where.rows)[:, None] + torch.from_numpy(where.columns)[None]
    looked_up = there.tables[units, there.codes.long()].transpose(1, 2).reshape(ROWS, COLUMNS)
    torch.testing.assert_close(there.dense, looked_up, rtol=0, atol=0)


@DEVICES
def test_codes_of_one_pass_are_those_of_the_compiled_code(device: str) -> None:
    where, k = maps(ROWS, COLUMNS)["one table"]
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"rounds": 1, "cycles": 0, "move_tables": False}
    hessian, tables = second_moment(COLUMNS), uniform_tables(1, k, 1)
    here = fit_tables(weight, hessian, tables, where, **how)
    with computing_on(device):
        there = fit_tables(weight, hessian, tables, where, **how)
    # a value in the middle between two entries may go either way, and what follows with it
    assert float((here.codes == there.codes).float().mean()) > 0.98


@DEVICES
def test_factors_are_those_of_the_cpu(device: str) -> None:
    hessian = second_moment(COLUMNS)
    expected, _ = feedback_factor(hessian, 0.01)
    with computing_on(device):
        found, _ = feedback_factor(hessian, 0.01)
        ordered = OrderedHessian.of(hessian, 0.01)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert ordered.factor.device.type == "cpu"


@DEVICES
def test_clustering_comes_as_close_as_the_compiled_one(device: str) -> None:
    values = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    here = cluster_1d(values, [4, 16])
    with computing_on(device):
        there = cluster_1d(values, [4, 16])
    for k, found in there.items():
        assert found.tables.device.type == "cpu"
        torch.testing.assert_close(found.sse, here[k].sse, rtol=0.02, atol=0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


SPEC = PalettizationSpec(n_bits=3, algorithm="gptq")
TABLES = KMeansPalettizerConfig(
    global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": SPEC})
)


@DEVICES
@pytest.mark.parametrize("config", [TABLES, QuantizerConfig.presets.w4()], ids=["tables", "w4"])
def test_compressed_models_are_as_close_to_the_exact_one(config: Any, device: str) -> None:
    torch.manual_seed(0)
    model, data = Net().eval(), [torch.randn(16, 16) for _ in range(4)]
    program = graphopt.capture(model, (data[0],))
    errors = []
    for chosen in (None, device):
        made = graphopt.compress(program, None, config, calibration_data=data, device=chosen)
        gap = torch.cat([made.module()(x) - model(x) for x in data])
        errors.append(float(gap.detach().square().mean()))
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    assert chosen_device() is None


def test_devices_that_are_not_here_are_refused() -> None:
    assert device_of(None) is None
    with pytest.raises(InputError, match="device='nonsense' cannot be used here"):
        graphopt.compress(Net(), (torch.randn(2, 16),), device="nonsense")
