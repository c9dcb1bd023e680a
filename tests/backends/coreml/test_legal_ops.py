"""What coremltools drops, miscomputes or refuses is saved right, and what it takes stays whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.together import in_groups, together
from torch import Tensor, nn

import graphopt
from graphopt.errors import LoweringError, VerificationError

LOWEST = torch.finfo(torch.float32).min
MASK = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1] * 5, [1] * 5]).bool()


class Function(nn.Module):
    """A function as a model, behind a layer so that it has a weight."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function = nn.Linear(8, 8), function

    def forward(self, x: Tensor, *rest: Tensor) -> Any:
        return self.function(self.layer(x), *rest)


class Twice(nn.Module):
    """A recurrent layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.lstm(x)[0])[0]


class Windows(nn.Module):
    """An image cut into windows, which takes six axes in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        cut = self.first(x).view(1, 2, 2, 2, 2, 4).permute(0, 1, 3, 2, 4, 5)
        return self.second(cut.reshape(4, 4, 4))


def saved(model: nn.Module, args: tuple[Tensor, ...], path: Path, precision: str) -> float:
    artifact = graphopt.lower(graphopt.capture(model.eval(), args), "coreml", precision=precision)
    artifact.save(path / "net.mlpackage")
    outcome = artifact.verify()
    assert outcome.complete
    return outcome.max_error


def of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


KINDS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "scaled sums": (lambda x, y: torch.rsub(x, y, alpha=2) - y.sub(x, alpha=3), (of(3, 8),) * 2),
    "means in another type": (
        lambda x, i: (
            i.mean(dtype=torch.float32),
            i.mean(1, dtype=torch.float32),
            i.sum(0, dtype=torch.float32) / 2,
        ),
        (of(8, 8), torch.arange(6).reshape(2, 3) - 1),
    ),
    "whole numbers": (
        lambda x, y: (
            torch.addmm(x, y, x, beta=2, alpha=0.5)
            - torch.baddbmm(x[None], y[None], y[None], beta=0, alpha=3)
            + F.leaky_relu(x, 2) / F.celu(y + 3, 2)
            + F.threshold(x, 0, 20) * F.hardtanh(y, 0, 1)
            + torch.remainder(3, y)
            - torch.xlogy(2, y.abs() + 1)
        ),
        (of(8, 8), of(8, 8) + 1),
    ),
    "all at once": (lambda x: x[...].argmax() + x.var() + x.prod(-1).any(), (of(3, 8),)),
    "crossed bounds": (lambda x, a, b: x.clamp(a, b), (of(3, 8), of(8) + 1, of(8) - 1)),
    "several places": (lambda x, i: x[i, i].sum(-1) + x[:, i][i, :, None], (of(8, 8), MASK[0] * 1)),
    "runs": (lambda x: (x.cumprod(-1), *x.cummax(0), x.logcumsumexp(1)), (of(3, 8),)),
    "pool": (
        lambda x: F.avg_pool1d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        (of(3, 8),),
    ),
    "places of maxima": (lambda x: F.max_pool1d(x, 3, 2, return_indices=True), (of(1, 3, 8),)),
    "integer quotients": (
        lambda x, i: x[:, i // 2 + i % 3 - torch.div(i, 4, rounding_mode="trunc")],
        (of(3, 8), torch.arange(5)),
    ),
    "masked rows": (lambda x, m: F.scaled_dot_product_attention(x, x, x, m), (of(2, 5, 8), MASK)),
    "shared heads": (
        lambda x, k: F.scaled_dot_product_attention(x, k, k, enable_gqa=True),
        (of(1, 4, 5, 8), of(1, 2, 5, 8)),
    ),
    "computed factors of a norm": (
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b * 2),
        (of(1, 3, 4, 8), of(3), of(3)),
    ),
    "values at a mask": (
        lambda x, m, rows: (
            x.index_put((m,), x[0] + 1, accumulate=True),
            x.index_put((m,), rows, accumulate=True),
            x.index_put((x > 0,), x[0, :1]),
        ),
        (of(5, 8), torch.tensor([True, False, True, False, True]), of(3, 8)),
    ),
    "combined at places": (
        lambda x, i, y: (
            x.scatter(1, i, y, reduce="multiply"),
            x.scatter(0, i, 2.5, reduce="add"),
            x.sum().scatter(0, i[0, 0] * 0, 2.5, reduce="multiply"),
        ),
        (of(3, 8), torch.tensor([[0, 2], [1, 1], [2, 0]]), of(3, 2)),
    ),
    "loss of one row": (
        lambda x, i: (
            F.cross_entropy(x[0], i) * torch.ones(()) + F.nll_loss(x[1], i),
            *torch.var_mean(x),
        ),
        (of(3, 8), torch.tensor(5)),
    ),
    "counts given": (
        lambda x, n: (
            torch.repeat_interleave(x, n, 0, output_size=6),
            torch.repeat_interleave(x, n[:1], 1, output_size=24),
        ),
        (of(4, 8), torch.tensor([3, 0, 2, 1])),
    ),
    "repeated whole between slices": (
        lambda x: (F.pad(x, (8, 1), mode="circular"), F.pad(x, (2, 2), mode="reflect")),
        (of(1, 3, 8),),
    ),
    "triangles of infinities": (
        lambda x: (
            torch.triu(torch.full((8, 8), -torch.inf), diagonal=1) + x,
            x.masked_fill(x > 0, torch.inf).tril(-1),
        ),
        (of(8, 8),),
    ),
    "smaller image": (
        lambda x: F.interpolate(x, (3, 5), mode="bilinear", antialias=True),
        (of(1, 2, 8, 8),),
    ),
}


@pytest.mark.integration
@pytest.mark.coreml
@pytest.mark.parametrize("kinds", in_groups(KINDS, 4))
def test_what_the_converter_has_not_right_is_saved_right(kinds: list[str], tmp_path: Path) -> None:
    functions = {kind: (Function(KINDS[kind][0]), KINDS[kind][1]) for kind in kinds}
    assert saved(*together(functions, kinds), tmp_path, "float32") < 1e-4


@pytest.mark.integration
@pytest.mark.coreml
def test_values_of_six_axes_are_rounded_in_fewer(tmp_path: Path) -> None:
    x = of(1, 4, 4, 4)
    program = graphopt.compress(
        Windows().eval(), (x,), {"quantization": {}}, calibration_data=[(x,)], progress=False
    )
    rounded = [
        node.meta["val"].dim()
        for node in program.graph_module.graph.nodes
        if "quantize_per_tensor" in str(node.target)
    ]
    assert 6 in rounded
    artifact = graphopt.lower(program, "coreml", precision="float32")
    artifact.save(tmp_path / "m.mlpackage")
    assert artifact.verification is not None
    assert artifact.verification.max_error < 1e-5


@pytest.mark.integration
@pytest.mark.coreml
def test_recurrent_layer_that_is_called_twice_is_saved_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert saved(Twice(), (of(2, 5, 8),), tmp_path, "float32") < 1e-5


@pytest.mark.integration
@pytest.mark.coreml
def test_lowest_float_masks_in_float16(tmp_path: Path) -> None:
    masked = Function(lambda x, m: ((x @ x.mT) + (1 - m) * LOWEST).softmax(-1) @ x)
    assert saved(masked, (of(1, 5, 8), MASK[:1].float() * 0 + 1), tmp_path, "float16") < 5e-3


@pytest.mark.integration
@pytest.mark.coreml
def test_what_overflows_in_float16_stays_in_float32(tmp_path: Path) -> None:
    wide = Function(lambda x: (torch.exp(20 + x) + 1).log())
    assert saved(wide, (of(3, 8),), tmp_path, "float16") < 5e-3


@pytest.mark.integration
@pytest.mark.coreml
@pytest.mark.parametrize(
    "options",
    [
        {"calibration_data": [(50.0 * of(3, 8).abs(),)]},
        {"ignored_ops": lambda node: node.name.split("_")[0] in ("exp", "add", "log")},
    ],
    ids=["calibration", "ignored"],
)
def test_other_calls_than_the_example_say_what_stays_in_float32(
    options: dict[str, Any], tmp_path: Path
) -> None:
    program = graphopt.capture(Function(lambda x: (torch.exp(x) + 1).log()), (of(3, 8),))
    large = (50.0 * of(3, 8).abs(),)
    graphopt.lower(program, "coreml", **options).save(tmp_path / "kept.mlpackage", verify=[large])
    with pytest.raises(VerificationError, match="exp"):
        graphopt.lower(program, "coreml").save(tmp_path / "narrow.mlpackage", verify=[large])


@pytest.mark.integration
@pytest.mark.coreml
def test_op_that_nothing_can_be_written_in_is_named_with_its_module() -> None:
    program = graphopt.capture(Function(lambda x: x.long() << 1), (of(3, 8),))
    with pytest.raises(LoweringError, match=r"shift.* in "):
        graphopt.lower(program, "coreml")


@pytest.mark.integration
@pytest.mark.coreml
def test_what_core_ml_takes_whole_stays_whole() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.PReLU(8),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.Flatten(2),
        nn.LayerNorm(9),
        nn.GELU(),
        nn.Linear(9, 4),
        nn.Softmax(-1),
    )
    # equal factors would be a leaky ReLU
    nn.init.uniform_(net[2].weight, 0.1, 0.3)
    artifact = graphopt.lower(graphopt.capture(net.eval(), (of(1, 3, 14, 14),)), "coreml")
    ops = [op.op_type for op in artifact.model._mil_program.functions["main"].operations]
    whole = [
        "conv",
        "prelu",
        "max_pool",
        "avg_pool",
        "reshape",
        "layer_norm",
        "gelu",
        "linear",
        "softmax",
    ]
    assert [op for op in ops if op not in ("const", "cast")] == whole
