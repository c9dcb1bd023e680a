"""Error feedback and coordinate descent where table entries lie along columns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.feedback_problems import damped, second_moment
from torch import Tensor

from graphopt.numerics.feedback_columns import ColumnMap, fit_column_tables

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLUMNS, SIZE, ENTRIES = 6, 12, 2, 8


def problem(groups: int = 1, size: int = SIZE) -> tuple[Tensor, Tensor, Tensor, ColumnMap]:
    """A matrix, a Hessian, tables and a map; `groups` tables of rows."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    tables = torch.randn(groups, ENTRIES, size, generator=generator)
    per_table = ROWS // groups * (COLUMNS // size)
    numbers = torch.arange(ROWS * COLUMNS // size).reshape(ROWS, -1).repeat_interleave(size, 1)
    where = ColumnMap.of(numbers, per_table, size)
    assert where is not None
    return weight, second_moment(COLUMNS).float(), tables, where


def by_definition(weight: Tensor, hessian: Tensor, tables: Tensor, where: ColumnMap) -> np.ndarray:
    """Codes [rows, units]: each unit's entry of least error after all open columns make up for it."""
    h = damped(hessian, 0.01).numpy()
    units = where.columns.numpy()
    order = np.argsort(-hessian.diagonal().numpy()[units].sum(1), kind="stable")
    codes = np.empty((len(weight), len(units)), np.int64)
    for row, values in enumerate(weight.double().numpy().copy()):
        table = tables[where.rows[row]].double().numpy()
        for place, unit in enumerate(order):
            later = units[order[place + 1 :]].reshape(-1)
            open_columns = np.concatenate([units[unit], later])
            inverse = np.linalg.inv(h[np.ix_(open_columns, open_columns)])
            size = units.shape[1]
            own = np.linalg.inv(inverse[:size, :size])
            gaps = values[units[unit]] - table
            best = int(np.einsum("ka,ab,kb->k", gaps, own, gaps).argmin())
            codes[row, unit] = best
            values[later] -= gaps[best] @ own @ inverse[:size, size:]
    return codes


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [2, 4])
def test_codes_are_those_of_the_definition(groups: int, size: int) -> None:
    weight, hessian, tables, where = problem(groups, size)
    fit = fit_column_tables(weight, hessian, tables, where, rounds=1, cycles=0, move_tables=False)
    assert np.array_equal(fit.codes.numpy(), by_definition(weight, hessian, tables, where))
    own = torch.from_numpy(where.rows)
    dense = tables[own[:, None], fit.codes.long()].reshape(ROWS, COLUMNS)
    torch.testing.assert_close(fit.dense, dense, rtol=0, atol=0)
    gap = (weight - dense).double()
    wanted = weight.double()
    h = damped(hessian, 0.01)
    relative = ((gap @ h) * gap).sum() / ((wanted @ h) * wanted).sum()
    assert fit.error == pytest.approx(float(relative), rel=1e-4)


def test_coordinate_descent_ends_where_no_single_code_lowers_the_error() -> None:
    weight, hessian, tables, where = problem()
    fit = fit_column_tables(weight, hessian, tables, where, rounds=1, cycles=50, move_tables=False)
    h = damped(hessian, 0.01)

    def error(codes: Tensor) -> Tensor:
        gap = (weight - tables[0][codes.long()].reshape(ROWS, COLUMNS)).double()
        return ((gap @ h) * gap).sum(1)

    reached = error(fit.codes)
    for unit in range(COLUMNS // SIZE):
        for entry in range(ENTRIES):
            other = fit.codes.clone()
            other[:, unit] = entry
            assert bool((error(other) >= reached * (1 - 1e-5)).all())


def test_moved_tables_lower_the_error() -> None:
    weight, hessian, tables, where = problem(2)
    still = fit_column_tables(weight, hessian, tables, where, rounds=1)
    moved = fit_column_tables(weight, hessian, tables, where, rounds=4)
    assert moved.error < 0.9 * still.error


def test_entries_that_do_not_lie_along_columns_have_no_map() -> None:
    numbers = torch.arange(8).reshape(2, 4)
    assert ColumnMap.of(numbers, 4, 2) is None
    assert ColumnMap.of(numbers[:, :3], 3, 2) is None
