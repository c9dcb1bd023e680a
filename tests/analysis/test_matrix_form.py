"""Every op with a weight is a product of matrices: forward, gradient, and back to the tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.analysis.matrix_form import WeightUse, weight_uses
from graphopt.analysis.weights import find_weights
from graphopt.ir.captured_module import CapturedModule

Op = Callable[[Tensor, Tensor], Tensor]
Case = tuple[Op, tuple[int, ...], tuple[int, ...]]  # op, shape of the weight, shape of the input


class Apply(nn.Module):
    """One op on one stored weight."""

    def __init__(self, op: Op, weight: Tensor) -> None:
        super().__init__()
        self.op = op
        self.w = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.w)


def case(op: Op, weight: tuple[int, ...], x: tuple[int, ...]) -> Case:
    return op, weight, x


def conv(rank: int, **options: object) -> Op:
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return lambda x, w: function(x, w, **options)


def transposed(rank: int, **options: object) -> Op:
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    return lambda x, w: function(x, w, **options)


def general(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.aten.convolution.default(x, w, None, [2, 1], [1, 2], [1, 2], False, [0, 0], 2)


def general_transposed(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.aten.convolution.default(x, w, None, [2, 1], [1, 2], [1, 2], True, [1, 0], 2)


CONVS = {
    "conv1d": case(conv(1), (6, 4, 3), (3, 4, 9)),
    "conv1d stride leaves a rest": case(conv(1, stride=3, padding=1), (6, 4, 2), (3, 4, 10)),
    "conv1d unbatched": case(conv(1, padding=2), (6, 4, 3), (4, 9)),
    "conv2d": case(conv(2, padding=1), (6, 4, 3, 3), (3, 4, 7, 8)),
    "conv2d pointwise": case(conv(2), (6, 4, 1, 1), (3, 4, 5, 4)),
    "conv2d stride": case(conv(2, stride=(2, 3), padding=(1, 0)), (6, 4, 3, 3), (3, 4, 8, 9)),
    "conv2d dilation": case(conv(2, dilation=(2, 1), padding=2), (6, 4, 3, 3), (3, 4, 8, 7)),
    "conv2d groups": case(conv(2, groups=2), (6, 2, 3, 3), (3, 4, 7, 7)),
    "conv2d depthwise": case(conv(2, groups=4, padding=1), (8, 1, 3, 3), (3, 4, 6, 6)),
    "conv2d same": case(conv(2, padding="same"), (6, 4, 3, 3), (3, 4, 6, 5)),
    "conv2d same, even kernel": case(conv(2, padding="same"), (6, 4, 4, 2), (3, 4, 6, 7)),
    "conv2d same, dilated": case(
        conv(2, padding="same", dilation=(1, 3), groups=2), (6, 2, 2, 4), (3, 4, 6, 9)
    ),
    "conv2d valid": case(conv(2, padding="valid", stride=2), (6, 4, 3, 3), (3, 4, 7, 8)),
    "conv2d asymmetric kernel": case(conv(2, padding=(0, 2)), (6, 4, 1, 5), (3, 4, 5, 6)),
    "conv2d unbatched": case(conv(2, groups=2), (6, 2, 3, 2), (4, 7, 7)),
    "conv3d": case(
        conv(3, stride=(1, 2, 1), padding=1, dilation=(1, 1, 2), groups=2),
        (4, 2, 3, 2, 2),
        (2, 4, 4, 6, 5),
    ),
    "aten.convolution": case(general, (6, 2, 3, 2), (3, 4, 7, 8)),
}

TRANSPOSED = {
    "transposed1d": case(transposed(1), (4, 6, 3), (3, 4, 7)),
    "transposed1d stride": case(
        transposed(1, stride=3, padding=1, output_padding=2), (4, 6, 4), (3, 4, 5)
    ),
    "transposed1d groups": case(transposed(1, stride=2, groups=2), (4, 3, 3), (3, 4, 5)),
    "transposed1d unbatched": case(transposed(1, stride=2), (4, 6, 3), (4, 5)),
    "transposed2d": case(transposed(2, stride=2), (4, 6, 2, 2), (3, 4, 5, 4)),
    "transposed2d crops its output": case(
        transposed(2, stride=(2, 1), padding=(2, 1)), (4, 6, 3, 4), (3, 4, 5, 6)
    ),
    "transposed2d all": case(
        transposed(
            2, stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(2, 1), groups=2
        ),
        (4, 3, 3, 2),
        (3, 4, 5, 4),
    ),
    "transposed2d depthwise": case(transposed(2, stride=2, groups=4), (4, 1, 3, 3), (3, 4, 4, 5)),
    "transposed3d": case(
        transposed(3, stride=2, padding=1, output_padding=1), (2, 3, 3, 2, 3), (2, 2, 3, 4, 3)
    ),
    "aten.convolution transposed": case(general_transposed, (4, 3, 3, 2), (3, 4, 5, 6)),
}

PRODUCTS = {
    "linear": case(F.linear, (6, 5), (7, 5)),
    "linear on sequences": case(F.linear, (6, 5), (3, 7, 5)),
    "linear on images": case(F.linear, (6, 5), (3, 2, 4, 5)),
    "linear on a vector": case(F.linear, (6, 5), (5,)),
    "linear of a transpose": case(lambda x, w: F.linear(x, w.t()), (5, 6), (3, 7, 5)),
    "linear of a flat weight": case(lambda x, w: F.linear(x, w.flatten(1)), (6, 5, 1, 1), (7, 5)),
    "linear of a view": case(lambda x, w: F.linear(x, w.view(6, 5)), (30,), (7, 5)),
    "x @ W": case(lambda x, w: x @ w, (5, 6), (7, 5)),
    "x @ W on sequences": case(lambda x, w: x @ w, (5, 6), (3, 7, 5)),
    "x @ W.T": case(lambda x, w: x @ w.T, (6, 5), (3, 7, 5)),
    "W @ x": case(lambda x, w: w @ x, (6, 5), (5, 7)),
    "W @ x on sequences": case(lambda x, w: w @ x, (6, 5), (3, 5, 7)),
    "W.T @ x": case(lambda x, w: w.T @ x, (5, 6), (3, 5, 7)),
    "mm": case(lambda x, w: torch.mm(x, w), (5, 6), (7, 5)),
    "addmm, W on the right": case(lambda x, w: torch.addmm(x.new_zeros(6), x, w), (5, 6), (7, 5)),
    "addmm, W on the left": case(lambda x, w: torch.addmm(x.new_zeros(7), w, x), (6, 5), (5, 7)),
}

CASES: dict[str, Case] = {**CONVS, **TRANSPOSED, **PRODUCTS}
# one sample, or samples along the last dimension
NO_SAMPLES = ("linear on a vector", "W @ x", "addmm, W on the left")


def uses_of(model: nn.Module, *x: Tensor) -> tuple[CapturedModule, dict[str, list[WeightUse]]]:
    gm = graphopt.capture(model, x).graph_module
    return gm, weight_uses(gm, find_weights(gm))


@cache
def built(name: str) -> tuple[Apply, WeightUse, Tensor]:
    op, weight, shape = CASES[name]
    model = Apply(op, torch.randn(weight, dtype=torch.float64))
    x = torch.randn(shape, dtype=torch.float64)
    _, found = uses_of(model, x)
    (use,) = found["w"]
    return model, use, x


@pytest.mark.parametrize("name", CASES)
def test_rows_times_columns_are_the_gradient_of_the_stored_weight(name: str) -> None:
    model, use, x = built(name)
    y = model(x)
    gradient = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, model.w, gradient)
    rows, columns = use.form.rows(gradient, x), use.form.columns(x)
    assert rows.shape[:3] == columns.shape[:3]
    product = torch.einsum("bgpr,bgpc->grc", rows, columns)
    found = use.pull_back(product, model.w.shape)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_sampled_positions_are_those_of_all_columns(name: str) -> None:
    _, use, x = built(name)
    columns = use.form.columns(x)
    assert use.form.count(x) == (columns.shape[0], *columns.shape[2:])
    at = torch.randperm(columns.shape[0] * columns.shape[2])[:5]
    expected = columns.transpose(0, 1).flatten(1, 2)[:, at]
    torch.testing.assert_close(use.form.sampled(x, at), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in NO_SAMPLES and "unbatched" not in name]
)
def test_rows_and_columns_of_a_sample_are_those_of_the_sample_alone(name: str) -> None:
    model, use, x = built(name)
    y = model(x)
    gradient = torch.randn_like(y)
    rows, columns = use.form.rows(gradient, x), use.form.columns(x)
    assert rows.shape[0] == columns.shape[0] == x.shape[0]
    for sample in range(x.shape[0]):
        own = model(x[sample : sample + 1])
        (expected,) = torch.autograd.grad(own, model.w, gradient[sample : sample + 1])
        product = torch.einsum("gpr,gpc->grc", rows[sample], columns[sample])
        found = use.pull_back(product, model.w.shape)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [*CONVS, *PRODUCTS])
def test_matrix_times_columns_is_the_output(name: str) -> None:
    model, use, x = built(name)
    y = model(x).detach()
    product = torch.einsum("grc,bgpc->bgpr", use.matrix(model.w.detach()), use.form.columns(x))
    batch, groups, positions, height = product.shape
    if use.form.kind == "conv":
        made = product.permute(0, 1, 3, 2).reshape(batch, groups * height, positions)
    elif use.form.kind == "left":
        made = product[:, 0].mT if y.ndim == 3 else product[:, 0, 0].T
    else:
        made = product
    torch.testing.assert_close(made.reshape(y.shape), y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_products_have_the_same_inner_product_with_any_gradient(name: str) -> None:
    model, use, x = built(name)
    y = model(x).detach()
    gradient = torch.randn_like(y)
    product = torch.einsum("grc,bgpc->bgpr", use.matrix(model.w.detach()), use.form.columns(x))
    found = (use.form.rows(gradient, x) * product).sum()
    torch.testing.assert_close(found, (gradient * y).sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_operand_undoes_matrix(name: str) -> None:
    model, use, _ = built(name)
    operand = use.operand(model.w.detach())
    assert torch.equal(use.form.operand(use.form.matrix(operand), operand.shape), operand)


@pytest.mark.parametrize("name", CASES)
def test_pull_back_undoes_matrix(name: str) -> None:
    model, use, _ = built(name)
    stored = model.w.detach()
    assert torch.equal(use.pull_back(use.matrix(stored), stored.shape), stored)


def test_parts_of_a_fused_weight_pull_back_to_their_own_places() -> None:
    def fused(x: Tensor, w: Tensor) -> Tensor:
        first, second, third = w.split([3, 4, 3])
        return torch.cat([F.linear(x, third), F.linear(x, first) * 2, F.linear(x, second)], -1)

    model = Apply(fused, torch.randn(10, 5, dtype=torch.float64))
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    _, found = uses_of(model, x)
    assert len(found["w"]) == 3
    covered = torch.zeros(10)
    for use in found["w"]:
        matrix = use.matrix(model.w.detach())
        part = use.pull_back(matrix, model.w.shape)
        inside = part.abs().sum(1) > 0
        assert torch.equal(part[inside], model.w.detach()[inside])
        covered += inside
    assert torch.equal(covered, torch.ones(10))


def test_casts_are_followed_only_when_wanted() -> None:
    model = Apply(lambda x, w: F.linear(x, w.float()), torch.randn(6, 5).half())
    _, found = uses_of(model, torch.randn(7, 5))
    (use,) = found["w"]
    stored = model.w.detach()
    assert use.matrix(stored).dtype is torch.float32
    assert use.matrix(stored, casts=False).dtype is torch.float16
    numbers = torch.arange(30).reshape(6, 5)
    assert torch.equal(use.matrix(numbers, casts=False)[0], numbers)
    assert use.pull_back(torch.ones(1, 6, 5), (6, 5)).dtype is torch.float32


def test_lookup_has_one_column_per_row_of_the_table() -> None:
    model = nn.Embedding(11, 4)
    _, found = uses_of(model, torch.randint(0, 11, (2, 3)))
    (use,) = found["weight"]
    matrix = use.matrix(model.weight.detach())
    assert use.form.kind == "embedding"
    assert use.form.data == 1
    assert torch.equal(matrix[0], model.weight.detach().T)
    assert torch.equal(use.form.operand(matrix, (11, 4)), model.weight.detach())


def test_weight_cut_to_the_size_of_its_input_keeps_the_cut() -> None:
    model = Apply(lambda x, w: w[: x.shape[1], : x.shape[1]] @ x, torch.randn(9, 9))
    x = torch.randn(2, 6, 5)
    gm, found = uses_of(model, x)
    if "w" not in found:
        return  # left out: also right
    (use,) = found["w"]
    operand = use.operand(gm.w.detach())
    assert operand.shape != model.w.shape


class Mixed(nn.Module):
    """A linear layer whose weight another op reads as well."""

    def __init__(self, other: Op, weight: Tensor) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.w = nn.Parameter(weight)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        return self.other(F.linear(self.first(x), self.w), self.w)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.lstm = nn.LSTM(5, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.first(x))[0]


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.w = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.first(x), self.w)


@pytest.mark.integration
@pytest.mark.parametrize("kind", [Recurrent, Batched])
def test_weights_of_other_ops_are_left_out(kind: type[nn.Module]) -> None:
    gm, found = uses_of(kind(), torch.randn(3, 7, 5))
    assert {weight.name for weight in find_weights(gm)} > {"first.weight"}
    assert set(found) == {"first.weight"}


OTHERS = {
    "bmm": lambda y, w: torch.bmm(y, w.expand(3, 5, 5)),
    "matrix by vector": lambda y, w: y + w @ w.new_ones(5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_weight_with_one_other_use_is_left_out(name: str) -> None:
    model = Mixed(OTHERS[name], torch.randn(5, 5))
    _, found = uses_of(model, torch.randn(3, 7, 5))
    assert set(found) == {"first.weight"}


@pytest.mark.integration
def test_weight_that_no_state_op_reads_as_well_is_left_out() -> None:
    model = Mixed(lambda y, w: y * w.square().sum(), torch.randn(5, 5))
    _, found = uses_of(model, torch.randn(3, 7, 5))
    assert set(found) == {"first.weight"}


def test_tied_weight_lists_each_use() -> None:
    model = Mixed(lambda y, w: y @ w, torch.randn(5, 5))
    _, found = uses_of(model, torch.randn(3, 7, 5))
    assert [use.form.kind for use in found["w"]] == ["linear", "right"]
