"""Error feedback and coordinate descent over codes."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.feedback_problems import COLUMNS, MAPS, ROWS, damped, objective, problem, second_moment
from torch import Tensor

from graphopt.numerics.feedback import (
    TableMap,
    diagonal_blocks,
    feedback_factor,
    feedback_grouped,
    fit_tables,
)

Array = npt.NDArray[np.float64]


pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------- factor
def turned(factor: Tensor, own: Tensor, hessian: Tensor) -> Tensor:
    """What is left of a Hessian once columns have handed their errors on: the blocks' own squares."""
    count, size, _ = own.shape
    handed = -factor.double()
    blocks = diagonal_blocks(handed, size)
    unit = torch.eye(size, dtype=torch.float64).expand(count, size, size)
    torch.testing.assert_close(blocks, unit, rtol=0, atol=1e-6)
    left = torch.linalg.solve(handed, hessian)
    return torch.linalg.solve(handed, left.T).T


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_factor_leaves_of_the_damped_hessian_the_blocks_alone(damping: float, size: int) -> None:
    hessian = second_moment(24)
    factor, own = feedback_factor(hessian, damping, size)
    assert factor.dtype is torch.float32
    wide = damped(hessian, damping)
    left = turned(factor, own, wide)
    expected = torch.block_diag(*(own @ own.mT))
    torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-5 * float(wide.max()))


def test_a_hessian_that_is_not_definite_gets_more_damping() -> None:
    hessian = -0.05 * torch.ones(6, 6) + torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 1e-3]))
    assert float(torch.linalg.eigvalsh(damped(hessian, 0.001)).min()) < 0
    factor, own = feedback_factor(hessian, 0.001)
    levels = [0.001 * 10**step for step in range(1, 6)]
    fitting = next(d for d in levels if float(torch.linalg.eigvalsh(damped(hessian, d)).min()) > 0)
    left = turned(factor, own, damped(hessian, fitting))
    torch.testing.assert_close(left, (own**2).reshape(-1).diag(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_columns_that_are_one_block_hand_nothing_on(size: int) -> None:
    hessian = second_moment(size)
    factor, own = feedback_factor(hessian, 0.01, size)
    torch.testing.assert_close(factor, -torch.eye(size), rtol=0, atol=1e-6)
    torch.testing.assert_close(own[0] @ own[0].mT, damped(hessian, 0.01), rtol=1e-5, atol=1e-6)


def test_inputs_that_are_always_zero_have_a_finite_factor() -> None:
    assert bool(torch.isfinite(feedback_factor(torch.zeros(4, 4), 0.01)[0]).all())


@contextmanager
def within(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


ENDLESS = {
    "NaN": (torch.full((3, 3), torch.nan), 0.01),
    "Inf": (torch.full((3, 3), torch.inf), 0.01),
    "singular and undamped": (torch.ones(3, 3), 0.0),
}


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer")
@pytest.mark.parametrize("name", ENDLESS)
def test_no_hessian_takes_forever(name: str) -> None:
    with within(1.0), suppress(ValueError, RuntimeError):  # a refusal is as good
        feedback_factor(*ENDLESS[name])


# ---------------------------------------------------------------------------- feedback
def gptq(
    weight: Tensor, hessian: Tensor, tables: Tensor, where: TableMap, damping: float
) -> tuple[npt.NDArray[np.int64], Array]:
    """Column after column by decreasing diagonal; what is left is compensated exactly."""
    order = np.argsort(-hessian.numpy().diagonal(), kind="stable")
    w = weight.double().numpy()[:, order].copy()
    h = damped(hessian, damping).numpy()[np.ix_(order, order)]
    columns = where.columns[order]
    entries = tables.double().numpy()
    rows, size = w.shape[0], where.size
    codes = np.zeros((rows // size, w.shape[1]), np.int64)
    for j in range(w.shape[1]):
        inverse = np.linalg.inv(h[j:, j:])
        for unit in range(rows // size):
            mine = slice(unit * size, (unit + 1) * size)
            table = entries[where.rows[unit] + columns[j]]
            code = ((w[mine, j] - table) ** 2).sum(1).argmin()
            codes[unit, j] = code
            error = (w[mine, j] - table[code]) / inverse[0, 0]
            w[mine, j + 1 :] -= np.outer(error, inverse[0, 1:])
            w[mine, j] = table[code]
    back = np.argsort(order)
    return codes[:, back], w[:, back]


@pytest.mark.parametrize("name", MAPS)
def test_one_feedback_pass_is_gptq_with_tables(name: str) -> None:
    weight, hessian, tables, where = problem(name)
    expected, values = gptq(weight, hessian, tables, where, 0.01)
    found = fit_tables(weight, hessian, tables, where, rounds=1, cycles=0, move_tables=False)
    agreement = float((found.codes.numpy() == expected).mean())
    assert agreement > 0.999
    assert torch.equal(found.tables, tables)
    same = np.repeat(found.codes.numpy() == expected, where.size, axis=0)
    torch.testing.assert_close(
        found.dense.numpy()[same], values[same].astype(np.float32), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", MAPS)
def test_groups_of_a_convolution_are_fitted_with_their_own_inputs(name: str) -> None:
    where, _ = MAPS[name]
    weight, hessian, tables, _ = problem(name)
    hessians = torch.stack([hessian, second_moment(COLUMNS, seed=5)])
    both = TableMap(np.concatenate([where.rows, where.rows]), where.columns, where.size)
    groups = torch.stack([weight, weight.flip(0)])
    found = feedback_grouped(groups, hessians, tables, both)
    # there columns keep their order, so the reference gets them with a falling diagonal
    units = ROWS // where.size
    for number in range(2):
        mine = found[number * units : (number + 1) * units].numpy()
        expected = in_order(groups[number], hessians[number], tables, where)
        assert float((mine == expected).mean()) > 0.999


def in_order(weight: Tensor, hessian: Tensor, tables: Tensor, where: TableMap) -> Array:
    """As `gptq`, from the first column to the last."""
    h, w = damped(hessian, 0.01).numpy(), weight.double().numpy().copy()
    entries, size = tables.double().numpy(), where.size
    codes = np.zeros((len(w) // size, w.shape[1]))
    for j in range(w.shape[1]):
        inverse = np.linalg.inv(h[j:, j:])
        for unit in range(len(codes)):
            mine = slice(unit * size, (unit + 1) * size)
            table = entries[where.rows[unit] + where.columns[j]]
            code = ((w[mine, j] - table) ** 2).sum(1).argmin()
            codes[unit, j] = code
            w[mine, j + 1 :] -= np.outer(w[mine, j] - table[code], inverse[0, 1:] / inverse[0, 0])
    return codes


def test_with_uncorrelated_inputs_feedback_takes_the_nearest_entries() -> None:
    weight, _, tables, where = problem("one table")
    hessian = torch.diag(torch.rand(COLUMNS) + 0.1)
    found = fit_tables(weight, hessian, tables, where, rounds=1, move_tables=False)
    nearest = (weight[..., None] - tables.flatten()).abs().argmin(-1)
    assert torch.equal(found.codes.long(), nearest)


# ---------------------------------------------------------------------------- descent
@pytest.mark.parametrize("name", MAPS)
def test_dense_codes_and_error_belong_together(name: str) -> None:
    weight, hessian, tables, where = problem(name)
    importance = torch.rand(ROWS).repeat_interleave(4)[:ROWS] + 0.1
    importance = importance.reshape(-1, 4).mean(1).repeat_interleave(4)
    found = fit_tables(weight, hessian, tables, where, importance=importance)
    table = torch.from_numpy(where.rows)[:, None] + torch.from_numpy(where.columns)[None]
    dense = found.tables[table, found.codes.long()]  # units × columns × size
    dense = dense.permute(0, 2, 1).reshape(ROWS, COLUMNS)
    assert torch.equal(found.dense, dense)
    h = damped(hessian, 0.01)
    reached = objective(weight, dense, h, importance)
    energy = objective(weight, torch.zeros_like(weight), h, importance)
    assert found.error == pytest.approx(reached / energy, rel=1e-3)


@pytest.mark.parametrize("name", MAPS)
def test_coordinate_descent_never_raises_the_objective(name: str) -> None:
    weight, hessian, tables, where = problem(name)
    h = damped(hessian, 0.01)
    errors = [
        objective(
            weight,
            fit_tables(
                weight, hessian, tables, where, rounds=1, cycles=cycles, move_tables=False
            ).dense,
            h,
        )
        for cycles in range(5)
    ]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("name", MAPS)
def test_after_enough_cycles_no_single_code_can_be_improved(name: str) -> None:
    weight, hessian, tables, where = problem(name)
    found = fit_tables(weight, hessian, tables, where, rounds=1, cycles=60, move_tables=False)
    h = damped(hessian, 0.01)
    slope = h @ (weight.double() - found.dense.double()).T  # columns × rows
    table = torch.from_numpy(where.rows)[:, None] + torch.from_numpy(where.columns)[None]
    others = tables.double()[table]  # units × columns × k × size
    now = found.dense.double().reshape(-1, where.size, COLUMNS).permute(0, 2, 1)
    move = others - now[:, :, None]
    pull = slope.T.reshape(-1, where.size, COLUMNS).permute(0, 2, 1)
    change = h.diagonal()[:, None] * move.square().sum(-1) - 2 * (move * pull[:, :, None]).sum(-1)
    level = objective(weight, torch.zeros_like(weight), h) / weight.numel()
    assert float(change.min()) > -1e-4 * level


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    weight, hessian, tables, where = problem("tables of rows")
    one = fit_tables(weight, hessian, tables, where, rounds=1, move_tables=False)
    torch.set_num_threads(3)
    other = fit_tables(weight, hessian, tables, where, rounds=1, move_tables=False)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.dense, other.dense)


def test_more_rounds_are_never_worse() -> None:
    for name in ("one table", "tables of rows", "pairs"):
        weight, hessian, tables, where = problem(name)
        errors = [fit_tables(weight, hessian, tables, where, rounds=n).error for n in (1, 2, 3, 5)]
        assert all(after <= before for before, after in itertools.pairwise(errors))
        assert errors[-1] < 0.9 * errors[0]
