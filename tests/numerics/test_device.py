"""Torch's way on a device comes out as the compiled code does: error feedback, moments, clustering."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.devices import DEVICES
from helpers.feedback_problems import damped, maps, objective, second_moment, uniform_tables
from torch import Tensor, nn

import graphopt
from graphopt.errors import InputError
from graphopt.numerics.device import chosen_device, computing_on, device_of
from graphopt.numerics.feedback import OrderedHessian, feedback_factor, fit_tables
from graphopt.numerics.feedback_columns import ColumnMap, fit_column_tables
from graphopt.numerics.kmeans1d import cluster_1d
from graphopt.numerics.kmeans_nd import VectorSearch, cluster_vectors
from graphopt.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.quantization import QuantizerConfig

ROWS, COLUMNS = 32, 160  # more than a block of columns


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


@DEVICES
@pytest.mark.parametrize("weighted", [False, True])
def test_vectors_are_clustered_as_well_as_by_the_compiled_code(weighted: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 300, 2, generator=generator)
    weights = torch.rand(2, 300, generator=generator) if weighted else None
    how: dict[str, Any] = {"weights": weights, "search": VectorSearch(max_steps=8)}
    here = cluster_vectors(vectors, 8, **how)
    with computing_on(device):
        tables, codes, errors = cluster_vectors(vectors, 8, **how)
    assert {each.device.type for each in (tables, codes, errors)} == {"cpu"}
    torch.testing.assert_close(errors, here[2], rtol=0.02, atol=0)
    # codes are those of the nearest entries, and errors theirs
    distance = (vectors[:, :, None] - tables[:, None]).square().sum(3)
    assert torch.equal(distance.argmin(2), codes.long())
    least = distance.amin(2).double() * (1 if weights is None else weights)
    torch.testing.assert_close(errors, least.sum(1), rtol=1e-5, atol=0)


@DEVICES
def test_entries_that_serve_nothing_take_over_the_worst_vectors(device: str) -> None:
    vectors = torch.tensor([[0.0, 0.0]] * 20 + [[1.0, 1.0], [2.0, 0.0], [3.0, 3.0]])[None]
    with computing_on(device):
        tables, codes, errors = cluster_vectors(vectors, 4, search=VectorSearch(max_steps=8))
    assert float(errors) == 0
    assert torch.equal(tables[0, codes[0].long()], vectors[0])


@DEVICES
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [2, 4])
def test_feedback_of_vectors_along_columns_reaches_the_same_error(
    size: int, groups: int, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 8
    weight = torch.randn(rows, COLUMNS, generator=generator)
    tables = torch.randn(groups, 16, size, generator=generator)
    numbers = torch.arange(rows * COLUMNS // size).reshape(rows, -1).repeat_interleave(size, 1)
    where = ColumnMap.of(numbers, rows // groups * (COLUMNS // size), size)
    assert where is not None
    hessian = second_moment(COLUMNS)
    here = fit_column_tables(weight, hessian, tables, where, rounds=2, cycles=1)
    with computing_on(device):
        there = fit_column_tables(weight, hessian, tables, where, rounds=2, cycles=1)
    assert there.dense.device.type == "cpu"
    wide = damped(hessian, 0.01)
    found, expected = (objective(weight, fit.dense, wide) for fit in (there, here))
    assert found == pytest.approx(expected, rel=0.02)
    assert there.error == pytest.approx(found / objective(weight, 0 * weight, wide), rel=1e-3)
    looked_up = there.tables[torch.from_numpy(where.rows)[:, None], there.codes.long()]
    torch.testing.assert_close(there.dense, looked_up.reshape(rows, COLUMNS), rtol=0, atol=0)


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
