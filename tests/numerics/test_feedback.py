"""Error feedback, coordinate descent and least-squares tables against plain float64 versions."""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import FrameType

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.analysis.matrix_form import WeightUse, weight_uses
from graphopt.analysis.weights import find_weights
from graphopt.fitting.palettize_outputs import palettize_to_outputs
from graphopt.numerics import feedback as fb
from graphopt.numerics.feedback import TableMap, feedback_grouped, fit_tables, inverse_factor
from graphopt.schemes.palettize import PalettizedWeight, palettize
from graphopt.specs import PalettizationSpec, PerGroupedChannelGranularity, QuantizationSpec

Array = npt.NDArray[np.float64]


pytestmark = pytest.mark.usefixtures("one_thread")


def second_moment(columns: int, samples: int = 0, seed: int = 1) -> Tensor:
    """Of inputs that a random walk correlates."""
    generator = torch.Generator().manual_seed(seed)
    count = samples or 4 * columns
    noise = torch.randn(count, columns, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-0.5, 0.5, columns, dtype=torch.float64)
    x = (noise.cumsum(1) / math.sqrt(columns) + 0.3 * noise) * scale
    return (x.T @ x / count).float()


def damped(hessian: Tensor, damping: float) -> Tensor:
    wide = hessian.double()
    return wide + damping * wide.diagonal().mean() * torch.eye(len(wide), dtype=torch.float64)


def objective(weight: Tensor, q: Tensor, hessian: Tensor, rows: Tensor | None = None) -> float:
    gap = weight.double() - q.double()
    each = torch.einsum("ri,ij,rj->r", gap, hessian.double(), gap)
    return float(each.sum() if rows is None else each @ rows.double())


def one_table(units: int, columns: int, size: int = 1) -> TableMap:
    return TableMap(np.zeros(units, np.int64), np.zeros(columns, np.int64), size)


def uniform_tables(count: int, k: int, size: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(count, k, size, generator=generator)
    return found.sort(dim=1).values if size == 1 else found


# ---------------------------------------------------------------------------- inverse factor
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_factor_squares_to_the_inverse_of_the_damped_hessian(damping: float) -> None:
    hessian = second_moment(24)
    factor = inverse_factor(hessian, damping)
    inverse = torch.linalg.inv(damped(hessian, damping))
    assert factor.dtype is torch.float32
    assert torch.equal(factor, factor.triu())
    assert bool((factor.diagonal() > 0).all())
    wide = factor.double()
    torch.testing.assert_close(wide.T @ wide, inverse, rtol=1e-5, atol=1e-6 * inverse.max().item())


def test_a_hessian_that_is_not_definite_gets_more_damping() -> None:
    hessian = -0.05 * torch.ones(6, 6) + torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 1e-3]))
    assert float(torch.linalg.eigvalsh(damped(hessian, 0.001)).min()) < 0
    factor = inverse_factor(hessian, 0.001).double()
    levels = [0.001 * 10**step for step in range(1, 6)]
    fitting = next(d for d in levels if float(torch.linalg.eigvalsh(damped(hessian, d)).min()) > 0)
    inverse = torch.linalg.inv(damped(hessian, fitting))
    torch.testing.assert_close(
        factor.T @ factor, inverse, rtol=1e-5, atol=1e-6 * inverse.max().item()
    )


def test_inputs_that_are_always_zero_have_a_finite_factor() -> None:
    assert bool(torch.isfinite(inverse_factor(torch.zeros(4, 4), 0.01)).all())


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
        inverse_factor(*ENDLESS[name])


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


def maps(rows: int, columns: int) -> dict[str, tuple[TableMap, int]]:
    """Name → map, entries per table."""
    by_columns = np.repeat(np.arange(4), columns // 4)
    return {
        "one table": (one_table(rows, columns), 16),
        "two entries": (one_table(rows, columns), 2),
        "64 entries": (one_table(rows, columns), 64),
        "tables of rows": (
            TableMap(np.repeat(np.arange(8), rows // 8), np.zeros(columns, np.int64), 1),
            8,
        ),
        "tables of columns": (TableMap(np.zeros(rows, np.int64), by_columns, 1), 8),
        "pairs": (one_table(rows // 2, columns, 2), 16),
        "fours of two tables": (
            TableMap(np.repeat(np.arange(2), rows // 8), np.zeros(columns, np.int64), 4),
            32,
        ),
    }


ROWS, COLUMNS = 96, 32
MAPS = maps(ROWS, COLUMNS)


def problem(name: str) -> tuple[Tensor, Tensor, Tensor, TableMap]:
    where, k = MAPS[name]
    count = int(where.rows.max() + where.columns.max()) + 1
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    return weight, second_moment(COLUMNS), uniform_tables(count, k, where.size), where


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


# ---------------------------------------------------------------------------- tables
ACCUMULATE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "by products": fb._by_products,
    "by scatter": fb._by_scatter,
}
BY_ROWS = [name for name in MAPS if MAPS[name][0].by_rows]


def normal_problem(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, TableMap]:
    """Codes [columns, units], weight [columns, rows], Hessian, importance per unit, map."""
    weight, hessian, tables, where = problem(name)
    start = fit_tables(weight, hessian, tables, where, rounds=1, move_tables=False)
    importance = torch.rand(ROWS // where.size, dtype=torch.float64) + 0.1
    h = damped(hessian, 0.01).float()
    return start.codes.T.contiguous(), weight.T.contiguous(), h, importance, where


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
    solved = fb._solve(codes, h @ w, h, importance, where.rows, tables)
    rest = (codes, w, h, importance, where)
    if where.size == 1:
        assert torch.equal(solved, solved.sort(dim=1).values)
        # codes name the entries in the order that they had before
        order = newton_step(tables, *rest).argsort(1)
        solved = torch.zeros_like(solved).scatter_(1, order, solved)
    start, end = slope_at(tables, *rest), slope_at(solved, *rest)
    assert float(end.norm()) < 1e-3 * float(start.norm())
    assert float(table_loss(solved.double(), *rest)) < float(table_loss(tables.double(), *rest))


@pytest.mark.parametrize("name", BY_ROWS)
@pytest.mark.parametrize("way", ACCUMULATE)
def test_normal_equations_are_the_derivatives_of_the_objective(way: str, name: str) -> None:
    codes, w, h, importance, where = normal_problem(name)
    tables = problem(name)[2]
    left, right = ACCUMULATE[way](codes, h @ w, h, importance, where.rows, tables)
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
    given = (codes, h @ w, h, importance, where.rows, problem(name)[2])
    for one, other in zip(fb._by_products(*given), fb._by_scatter(*given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


def test_an_entry_that_no_code_names_keeps_its_value() -> None:
    codes, w, h, importance, where = normal_problem("one table")
    tables = problem("one table")[2]
    codes[codes == 15] = 14
    solved = fb._solve(
        codes, h @ w, h, importance, where.rows, tables + 10 * (tables.argsort(1) == 15)
    )
    assert float(solved[0, 15, 0]) == pytest.approx(float(tables[0, 15, 0]) + 10, rel=1e-5)


# ---------------------------------------------------------------------------- whole weights
class Applied(nn.Module):
    def __init__(self, op: Callable[[Tensor, Tensor], Tensor], weight: Tensor) -> None:
        super().__init__()
        self.op = op
        self.w = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.w)


def smooth(*shape: int) -> Tensor:
    """Correlated along channels (dimension 1) and neighbours, of unequal channel power."""
    x = torch.randn(shape)
    mixer = torch.randn(shape[1], max(shape[1] // 4, 2)) @ torch.randn(
        max(shape[1] // 4, 2), shape[1]
    )
    x = 0.2 * x + torch.einsum("ij,bj...->bi...", mixer, x) / shape[1] ** 0.5
    return x + 0.8 * x.roll(1, -1)


OPS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], Callable[[], Tensor]]] = {
    "linear": (F.linear, (32, 24), lambda: smooth(16, 24, 20).mT),
    "linear of a transpose": (
        lambda x, w: F.linear(x, w.t()),
        (24, 32),
        lambda: smooth(16, 24, 20).mT,
    ),
    "conv": (
        lambda x, w: F.conv2d(x, w, padding=1),
        (32, 8, 3, 3),
        lambda: smooth(4, 8, 12, 12),
    ),
    "grouped conv": (
        lambda x, w: F.conv2d(x, w, groups=2),
        (32, 8, 3, 3),
        lambda: smooth(4, 16, 12, 12),
    ),
    "transposed conv": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2),
        (16, 8, 3, 3),
        lambda: smooth(4, 16, 10, 10),
    ),
}
SPECS = {
    "per tensor": PalettizationSpec(n_bits=3),
    "groups on axis 0": PalettizationSpec(
        n_bits=2, granularity=PerGroupedChannelGranularity(axis=0, group_size=8)
    ),
    "groups on axis 1": PalettizationSpec(
        n_bits=2, granularity=PerGroupedChannelGranularity(axis=1, group_size=4)
    ),
    "pairs": PalettizationSpec(n_bits=4, cluster_dim=2),
    "int8 table": PalettizationSpec(n_bits=3, lut_qspec=QuantizationSpec()),
    "channel scale": PalettizationSpec(n_bits=3, enable_per_channel_scale=True),
}


@cache
def layer(name: str) -> tuple[Tensor, WeightUse, Tensor, Tensor, int]:
    """Weight, its op, its inputs, their second moment, output axis of the weight."""
    op, shape, inputs = OPS[name]
    torch.manual_seed(3)
    model, x = Applied(op, torch.randn(shape)), inputs()
    gm = graphopt.capture(model, (x,), dynamic_shapes=None).graph_module
    (weight,) = find_weights(gm)
    (use,) = weight_uses(gm, [weight])["w"]
    columns = use.form.columns(x.double()).transpose(0, 1).flatten(1, 2)
    hessian = columns.mT @ columns / columns.shape[1]
    return model.w.detach(), use, x, hessian.float(), weight.output_axis


def output_error(name: str, dense: Tensor) -> float:
    weight, _, x, _, _ = layer(name)
    op = OPS[name][0]
    exact, found = op(x.double(), weight.double()), op(x.double(), dense.double())
    return float((exact - found).square().sum() / exact.square().sum())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", OPS)
def test_outputs_come_closer_than_with_kmeans(name: str, spec: str) -> None:
    weight, use, _, hessian, axis = layer(name)
    before, moments = weight.clone(), hessian.clone()
    found = palettize_to_outputs(weight, SPECS[spec], use, hessian, output_axis=axis)
    assert found is not None
    assert torch.equal(weight, before)
    assert torch.equal(hessian, moments)
    plain = palettize(weight, SPECS[spec], output_axis=axis)
    gain = 10 * math.log10(output_error(name, plain.dense()) / output_error(name, found.dense()))
    assert gain >= (0 if name == "transposed conv" else 2)
    assert found.stored_bits() == plain.stored_bits()
    assert_same_kind(found, plain)


def assert_same_kind(found: PalettizedWeight, plain: PalettizedWeight) -> None:
    """Whatever lowers one stored form lowers the other."""
    assert found.layout == plain.layout
    assert (found.n_bits, found.dtype, found.lut_storage) == (
        plain.n_bits,
        plain.dtype,
        plain.lut_storage,
    )
    for field in ("indices", "lut", "lut_scale", "lut_offset", "channel_scale"):
        one, other = getattr(found, field), getattr(plain, field)
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.shape, one.dtype) == (other.shape, other.dtype), field


@pytest.mark.parametrize("spec", SPECS)
def test_reported_error_is_that_of_the_stored_weight(spec: str) -> None:
    weight, use, _, hessian, axis = layer("linear")
    found = palettize_to_outputs(weight, SPECS[spec], use, hessian, output_axis=axis)
    assert found is not None
    error = float((weight.double() - found.dense().double()).square().sum())
    assert found.sse == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_keep_their_type_and_gain_as_well(dtype: torch.dtype) -> None:
    weight, use, _, hessian, _ = layer("linear")
    narrow = weight.to(dtype)
    found = palettize_to_outputs(narrow, SPECS["per tensor"], use, hessian)
    assert found is not None
    plain = palettize(narrow, SPECS["per tensor"])
    assert found.dense().dtype is dtype
    assert_same_kind(found, plain)
    assert output_error("linear", found.dense()) < 0.7 * output_error("linear", plain.dense())


def test_the_same_call_gives_the_same_codes() -> None:
    weight, use, _, hessian, _ = layer("linear")
    spec = SPECS["pairs"]
    one, other = (palettize_to_outputs(weight, spec, use, hessian, seed=4) for _ in range(2))
    assert one is not None
    assert other is not None
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.lut, other.lut)


def test_rows_that_matter_more_err_less() -> None:
    weight, use, _, hessian, _ = layer("linear")
    importance = torch.ones(1, 32)
    importance[0, :4] = 1000.0

    def error(given: Tensor | None) -> float:
        found = palettize_to_outputs(
            weight, PalettizationSpec(n_bits=2), use, hessian, row_importance=given
        )
        assert found is not None
        return objective(weight[:4], found.dense()[:4], hessian[0])

    assert error(importance) < 0.9 * error(None)


@pytest.mark.parametrize("seed", range(12))
def test_six_weights_with_two_entries_come_near_the_best_of_all_codes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 6, generator=generator)
    hessian = second_moment(6, 40, seed)
    spec = PalettizationSpec(n_bits=1)
    _, use, *_ = layer("linear")
    found = palettize_to_outputs(weight, spec, use, hessian[None], damping=1e-6, rounds=10)
    assert found is not None
    best = math.inf
    h, w = hessian.double(), weight.double()[0]
    lower = torch.linalg.cholesky(h)
    for code in itertools.product([0, 1], repeat=6):
        chosen = torch.tensor(code)
        hot = torch.stack([chosen == 0, chosen == 1], 1).double()
        entries = torch.linalg.lstsq(lower.T @ hot, (lower.T @ w)[:, None], driver="gelsd").solution
        gap = w - (hot @ entries)[:, 0]
        best = min(best, float(gap @ h @ gap))
    reached = objective(weight, found.dense(), hessian)
    assert best * (1 - 1e-5) <= reached <= 1.5 * best


# ---------------------------------------------------------------------------- what has no fit
def use_of(model: nn.Module, x: Tensor, name: str) -> tuple[Tensor, WeightUse, int]:
    gm = graphopt.capture(model, (x,), dynamic_shapes=None).graph_module
    weight = next(each for each in find_weights(gm) if each.name == name)
    return weight.tensor.detach(), weight_uses(gm, [weight])[name][0], weight.output_axis


def no_fit(weight: Tensor, use: WeightUse, axis: int, spec: PalettizationSpec) -> bool:
    groups, _, columns = use.matrix(weight).shape
    hessian = torch.eye(columns).expand(groups, -1, -1)
    return palettize_to_outputs(weight, spec, use, hessian, output_axis=axis) is None


def test_entries_along_the_columns_have_no_fit() -> None:
    weight, use, *_ = layer("linear")
    assert no_fit(weight, use, 1, PalettizationSpec(cluster_dim=2))
    assert not no_fit(weight, use, 0, PalettizationSpec(cluster_dim=2))
    table = use_of(nn.Embedding(8, 6), torch.zeros(2, 3, dtype=torch.int64), "weight")
    assert no_fit(*table, PalettizationSpec(n_bits=2, cluster_dim=2))


def test_tables_that_cut_through_the_groups_of_a_convolution_have_no_fit() -> None:
    def spec(size: int) -> PalettizationSpec:
        granularity = PerGroupedChannelGranularity(axis=0, group_size=size)
        return PalettizationSpec(n_bits=2, granularity=granularity)

    model = nn.ConvTranspose2d(12, 6, 2, groups=3)
    given = use_of(model, torch.randn(2, 12, 4, 4), "weight")
    assert no_fit(*given, spec(6))
    assert not no_fit(*given, spec(2))
    assert not no_fit(*given, spec(12))


def test_entries_that_reach_into_two_groups_have_no_fit() -> None:
    model = nn.Conv2d(4, 4, 3, groups=4)
    given = use_of(model, torch.randn(2, 4, 5, 5), "weight")
    assert no_fit(*given, PalettizationSpec(n_bits=2, cluster_dim=2))
    assert not no_fit(*given, PalettizationSpec(n_bits=2))


def test_a_part_of_a_fused_weight_has_no_fit() -> None:
    def fused(x: Tensor, w: Tensor) -> Tensor:
        first, second = w.split([8, 4])
        return F.linear(x, first).sum(-1) + F.linear(x, second).sum(-1)

    given = use_of(Applied(fused, torch.randn(12, 6)), torch.randn(2, 6), "w")
    assert no_fit(*given, PalettizationSpec(n_bits=2))
