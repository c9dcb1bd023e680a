"""Least-squares tables for given codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.feedback_problems import MAPS, ROWS, damped, problem
from torch import Tensor

from graphopt.numerics import table_solve
from graphopt.numerics.feedback import TableMap, fit_tables
from graphopt.numerics.table_solve import TableFit, best_tables

pytestmark = pytest.mark.usefixtures("one_thread")


ACCUMULATE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "by products": table_solve._by_products,
    "by scatter": table_solve._by_scatter,
}


BY_ROWS = [name for name in MAPS if MAPS[name][0].by_rows]


def normal_problem(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, TableMap]:
    """Codes [columns, units], weight [columns, rows], Hessian, importance per unit, map."""
    weight, hessian, tables, where = problem(name)
    start = fit_tables(weight, hessian, tables, where, rounds=1, move_tables=False)
    importance = torch.rand(ROWS // where.size, dtype=torch.float64) + 0.1
    h = damped(hessian, 0.01).float()
    return start.codes.T.contiguous(), weight.T.contiguous(), h, importance, where


def slope_of(
    tables: Tensor, codes: Tensor, w: Tensor, h: Tensor, importance: Tensor, where: TableMap
) -> Tensor:
    """H (w − q), columns × rows."""
    del importance
    return h @ (w - tables[torch.from_numpy(where.rows)[None], codes.long()].flatten(1))


def table_loss(
    tables: Tensor, codes: Tensor, w: Tensor, h: Tensor, importance: Tensor, where: TableMap
) -> Tensor:
    chosen = tables[torch.from_numpy(where.rows)[None], codes.long()]  # columns × units × size
    gap = w.double() - chosen.flatten(1)
    each = (gap * (h.double() @ gap)).sum(0).reshape(-1, where.size).sum(1)
    return each @ importance


def slope_at(tables: Tensor, *rest: object) -> Tensor:
    leaf = tables.double().requires_grad_()
    (found,) = torch.autograd.grad(table_loss(leaf, *rest), leaf)  # type: ignore[arg-type]
    return found


def newton_step(tables: Tensor, *rest: object) -> Tensor:
    """The minimum of the quadratic objective, by its second derivatives."""
    start = tables.double()
    curvature = torch.autograd.functional.hessian(lambda each: table_loss(each, *rest), start)  # type: ignore[arg-type]
    wide = curvature.reshape(start.numel(), start.numel())
    step = torch.linalg.lstsq(wide, slope_at(tables, *rest).reshape(-1, 1), driver="gelsd").solution
    return start - step.reshape(start.shape)


@pytest.mark.parametrize("name", BY_ROWS)
def test_solved_tables_are_stationary(name: str) -> None:
    codes, w, h, importance, where = normal_problem(name)
    tables = problem(name)[2]
    rest = (codes, w, h, importance, where)
    solved = best_tables(
        TableFit(codes, slope_of(tables, *rest), h, importance, where.rows, tables)
    )
    if where.size == 1:
        assert torch.equal(solved, solved.sort(dim=1).values)
        # codes name the entries in the order that they had before
        order = newton_step(tables, *rest).argsort(1)
        solved = torch.zeros_like(solved).scatter_(1, order, solved)
    start, end = slope_at(tables, *rest), slope_at(solved, *rest)
    assert float(end.norm()) < 1e-3 * float(start.norm())
    assert float(table_loss(solved.double(), *rest)) < float(table_loss(tables.double(), *rest))


@pytest.mark.parametrize("name", BY_ROWS)
def test_gradients_come_to_what_the_equations_give(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, w, h, importance, where = normal_problem(name)
    tables = problem(name)[2]
    rest = (codes, w, h, importance, where)
    given = TableFit(codes, slope_of(tables, *rest), h, importance, where.rows, tables)
    least = float(table_loss(table_solve._by_equations(given).double(), *rest))
    losses = [float(table_loss(tables.double(), *rest))]
    for steps in (1, 3, 60):
        monkeypatch.setattr(table_solve, "_STEPS", steps)
        solved = table_solve._by_gradients(given)
        losses.append(float(table_loss(solved.double(), *rest)))
    assert losses == sorted(losses, reverse=True)
    left = [(loss - least) / (losses[0] - least) for loss in losses]
    assert left[3] < 1e-4


@pytest.mark.parametrize("name", BY_ROWS)
@pytest.mark.parametrize("way", ACCUMULATE)
def test_normal_equations_are_the_derivatives_of_the_objective(way: str, name: str) -> None:
    codes, w, h, importance, where = normal_problem(name)
    tables = problem(name)[2]
    left, right = ACCUMULATE[way](TableFit(codes, h @ w, h, importance, where.rows, tables))
    rest = (codes, w, h, importance, where)
    at_zero = slope_at(torch.zeros_like(tables), *rest)
    torch.testing.assert_close(
        right, -at_zero / 2, rtol=1e-4, atol=1e-5 * float(at_zero.abs().max())
    )
    probe = torch.randn(tables.shape, dtype=torch.float64)
    expected = (slope_at(probe, *rest) - at_zero) / 2
    torch.testing.assert_close(
        left @ probe, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )


@pytest.mark.parametrize("name", BY_ROWS)
def test_both_ways_to_accumulate_agree(name: str) -> None:
    codes, w, h, importance, where = normal_problem(name)
    given = TableFit(codes, h @ w, h, importance, where.rows, problem(name)[2])
    for one, other in zip(
        table_solve._by_products(given), table_solve._by_scatter(given), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


def test_an_entry_that_no_code_names_keeps_its_value() -> None:
    codes, w, h, importance, where = normal_problem("one table")
    tables = problem("one table")[2]
    codes[codes == 15] = 14
    tables = tables + 10 * (tables.argsort(1) == 15)
    slope = slope_of(tables, codes, w, h, importance, where)
    solved = best_tables(TableFit(codes, slope, h, importance, where.rows, tables))
    assert float(solved[0, 15, 0]) == pytest.approx(float(tables[0, 15, 0]), rel=1e-5)
