"""Ops that coreai-torch drops, miscomputes or refuses are right on the runtime."""

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
from graphopt.errors import LoweringError

pytestmark = pytest.mark.coreai
INF, NAN = float("inf"), float("nan")


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error_of(function: Callable[..., Any], args: tuple[Tensor, ...], path: Path) -> float:
    """Largest difference of the saved program to PyTorch, over all outputs."""
    module = function if isinstance(function, nn.Module) else Call(function)
    artifact = graphopt.lower(graphopt.capture(module.eval(), args), "coreai")
    artifact.save(path / "net.aimodel")
    return artifact.verification.max_error


X, Y = randn(1, 3, 9, 7), randn(4, 6, seed=1)
PLACES = torch.tensor([[0, 0, 1, 5, 2, 2], [3, 1, 0, 2, 4, 5], [5] * 6, [1, 1, 2, 2, 3, 3]])
ODD = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.5, -1.5, 2.5, -2.5, 3.0])
OTHER = torch.tensor([1.0, NAN, -INF, -0.0, 0.0, 1.5, -2.0, 2.0, -2.5, 4.0])
GRID = torch.rand(1, 4, 5, 2, generator=torch.Generator().manual_seed(2)) * 3 - 1.5
MASK = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(3)) > 0.4
MASK[0, 0, 2], MASK[1, 0, 0] = False, False
QUERY = randn(2, 4, 5, 8)


def sizes(x: Tensor, size: tuple[int, int]) -> list[Tensor]:
    modes = ("nearest", "nearest-exact", "bilinear", "bicubic", "area")
    plain = [F.interpolate(x, size, mode=mode) for mode in modes]
    smooth = [F.interpolate(x, size, mode=mode, antialias=True) for mode in modes[2:4]]
    return [*plain, *smooth]


def factors(x: Tensor, factor: float) -> list[Tensor]:
    def resized(x: Tensor, mode: str) -> Tensor:
        return F.interpolate(x, scale_factor=factor, mode=mode)

    flat = [resized(x, mode) for mode in ("nearest", "bilinear", "bicubic")]
    others = [resized(x[0], "nearest"), resized(x[0], "linear"), resized(x[..., :3], "bilinear")]
    return [*flat, *others, resized(x[None], "nearest"), resized(x[None], "trilinear")]


def averages(x: Tensor) -> list[Tensor]:
    return [
        F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
        F.avg_pool2d(x, 2, 3, 1, ceil_mode=True, count_include_pad=False),
        F.avg_pool2d(x, 3, 2, 1, count_include_pad=False, divisor_override=5),
        F.avg_pool2d(x[0], 3, 2, 1),
        F.avg_pool1d(x[0], 3, 2, 1, True, False),
        F.avg_pool3d(x[None], 2, 2, 1, True, False),
        F.adaptive_avg_pool2d(x, (12, 9)),
        F.adaptive_avg_pool3d(x[None], (2, 4, 3)),
    ]


def maxima(x: Tensor) -> list[Any]:
    return [
        F.max_pool2d(x, 3, 2, 1, return_indices=True),
        F.max_pool2d(x, 3, 2, 1, 1, True),
        F.max_pool2d(x, 2, 1, 0, 2, return_indices=True),
        F.max_pool1d(x[0], 3, 2, return_indices=True),
        F.max_pool3d(x[None], 2, 1, 1, 1, True, return_indices=True),
        F.adaptive_max_pool2d(x, (4, 3), return_indices=True),
        F.max_unpool2d(*F.max_pool2d(x, 2, 2, return_indices=True), 2, 2, output_size=(9, 7)),
    ]


def scatters(x: Tensor, places: Tensor) -> list[Tensor]:
    zeros = torch.zeros(4, 6)
    rows = places[1, :4] % 4
    return [
        zeros.scatter_add(1, places, x),
        zeros.scatter_reduce(1, places, x, "amax"),
        zeros.scatter_reduce(1, places, x, "mean", include_self=False),
        zeros.scatter(1, places[1:3, 2:5], x),
        zeros.scatter(1, places[1:2], 2.0),
        zeros.index_add(1, places[0], x, alpha=2),
        x.index_reduce(0, rows, x, "prod"),
        torch.ops.aten.index_put(x, [rows], x, True),
        torch.ops.aten.index_put(x, [None, rows[:2]], x[:1, :1]),
        torch.ops.aten.index_put(x, [x > 0], x[0, 0]),
        x.gather(1, places[:2, :3]),
        x.diagonal(1),
        x.unfold(1, 3, 2),
    ]


def orders(x: Tensor) -> list[Any]:
    return [
        x.sort(-1),
        x.sort(0, descending=True),
        x.kthvalue(2),
        x.median(-1),
        x.mode(-1),
        x.cumprod(0),
        x.cummax(1),
        x.logcumsumexp(0),
        x.argmin(1),
        torch.histc(x, 5, -1, 1),
        torch.searchsorted(torch.arange(5.0), x),
    ]


def statistics(x: Tensor) -> list[Any]:
    return [
        x.var(-1),
        x.std(0),
        F.batch_norm(x, None, None, training=True),
        torch.native_layer_norm(x, [6], None, None, 1e-5),
        F.elu(x, 0.7),
        F.huber_loss(x, x * 2, reduction="none"),
        F.cross_entropy(x, torch.tensor([1, 2, 3, 0]), reduction="none"),
        F.multi_margin_loss(x, torch.tensor([1, 2, 3, 0]), reduction="none"),
    ]


def odd_numbers(x: Tensor, y: Tensor) -> list[Tensor]:
    return [
        *(torch.floor(x), torch.ceil(x), torch.trunc(x), torch.isnan(x), torch.isfinite(x)),
        *(torch.nan_to_num(x), x >= y, x <= y, torch.fmax(x, y), torch.fmin(x, y)),
        *(torch.signbit(x), torch.copysign(x, y), torch.hypot(x, y)),
    ]


def of_booleans(x: Tensor) -> list[Tensor]:
    a, b = x > 0, x > 1
    return [a & b, a | b, a ^ b, a * b, a + b, ~a, a > b, a >= b, a.amax(1), torch.maximum(a, b)]


def without_axes(x: Tensor) -> list[Tensor]:
    one = x.reshape(())
    made = [
        *(one.max(), one.amin(), one.sum(), one.sum(0), one.mean(), one.prod(), one.prod(0)),
        *((one > 0).any(), one.argmax(), one.max(0).values, one.min(0).indices),
        *(one.softmax(0), one.log_softmax(0), one.cumsum(0), one.cumprod(0), one.flip(())),
        *(one.permute(()), one.sort().values, one.topk(1).values, one.expand(())),
    ]
    return [value.reshape(1) for value in made]


def attentions(q: Tensor, mask: Tensor) -> list[Tensor]:
    attend = F.scaled_dot_product_attention
    return [
        attend(q, q, q, mask),
        attend(q, q, q, torch.where(mask, 0.0, -INF)).transpose(1, 2).reshape(2, 5, 32),
        attend(q[0], q[0], q[0], mask[0].expand(4, 5, 5)),
        attend(q[0], q[0], q[0], is_causal=True),
        attend(q[None], q[None], q[None], mask[None]),
        attend(q, q, torch.cat([q, q], -1)),
        attend(q, q, q[..., :3], is_causal=True),
    ]


CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "scaled sums": (
        lambda x, y: (
            torch.add(x, y, alpha=0.5),
            torch.sub(x, y, alpha=2),
            torch.rsub(x, y, alpha=3),
            torch.rsub(x, 1.5, alpha=3),
            torch.addbmm(x[:, :4], x[None], y.mT[None], alpha=0.5),
        ),
        (Y, randn(4, 6)),
    ),
    "clamps": (
        lambda x, a, b: (
            torch.clamp(x, min=a, max=b),
            torch.clamp(x, min=1.0, max=-1.0),
            torch.clamp(torch.ceil(3 * x).int(), max=1.5),
            F.hardtanh(x, 0, 1),
        ),
        (Y, torch.rand(6), torch.rand(6) - 0.5),
    ),
    "sizes that grow and shrink": (lambda x: sizes(x, (7, 10)), (X,)),
    "sizes that shrink": (lambda x: sizes(x, (4, 3)), (X,)),
    "factors between integers": (lambda x: factors(x, 1.3), (X,)),
    "average pooling": (averages, (X,)),
    "maximum pooling": (maxima, (X,)),
    "scatters": (scatters, (Y, PLACES)),
    "sorting and running results": (orders, (Y,)),
    "statistics and losses": (statistics, (Y,)),
    "infinities and NaN": (odd_numbers, (ODD, OTHER)),
    "roundings of constants": (
        lambda x: (torch.floor(torch.arange(7.0) * 1.25 - 0.75) + x,),
        (torch.zeros(1),),
    ),
    "booleans": (of_booleans, (Y,)),
    "tensors without axes": (without_axes, (torch.tensor([0.7]),)),
    "masks of more axes": (
        lambda x, m, s: torch.masked_scatter(x, m, s),
        (Y[0], Y > 0, randn(24)),
    ),
    "special functions": (
        lambda x: (torch.lgamma(x), torch.digamma(x), torch.erfc(x), torch.erfinv(x / 5)),
        (Y,),
    ),
    "attention": (attentions, (QUERY, MASK)),
    "sampling": (
        lambda x, g: (
            F.grid_sample(x, g, align_corners=False),
            F.grid_sample(x, g, "nearest", "border", align_corners=False),
            F.grid_sample(x, g, "bilinear", "reflection", align_corners=True),
        ),
        (X, GRID),
    ),
    "transposed convolution of volumes": (
        nn.ConvTranspose3d(4, 6, (3, 2, 3), 2, 1, 1, groups=2, dilation=2),
        (randn(1, 4, 3, 4, 3),),
    ),
    "groups of rows": (
        lambda x, w: F.grouped_mm(
            x.bfloat16(), w.bfloat16(), offs=torch.tensor([3, 3, 5], dtype=torch.int32)
        ).float(),
        (torch.eye(5, 8), torch.arange(384.0).reshape(3, 8, 16) % 7),
    ),
}


GROUPS = in_groups(CASES, 5)
# the sample of the op database has resizes and pooling, too
SLOW = [pytest.param(*each.values, id=each.id, marks=pytest.mark.slow) for each in GROUPS[:2]]


@pytest.mark.integration
@pytest.mark.parametrize("names", [*SLOW, *GROUPS[2:]])
def test_right_on_the_runtime(names: list[str], tmp_path: Path) -> None:
    assert error_of(*together(CASES, names), tmp_path) < 1e-3


def test_float64_is_cast_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layer = nn.Linear(4, 4).double()
    assert error_of(layer, (randn(2, 4).double(),), tmp_path) < 1e-5
    assert "float64 is cast to float32" in caplog.text


@pytest.mark.integration
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            lambda x: torch.view_as_complex(x) * torch.ones(3, dtype=torch.cfloat),
            "complex numbers",
        ),
        (lambda x: x + torch.rand_like(x), "no random numbers"),
        (lambda x: x[x > 0] * 2, "depends on data"),
    ],
)
def test_what_core_ai_cannot_compute_is_refused_by_name(
    function: Callable[..., Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(LoweringError, match=said):
        error_of(function, (randn(3, 2),), tmp_path)


@pytest.mark.integration
def test_ordinary_networks_keep_their_fused_ops(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.norm = nn.LayerNorm(8)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = F.max_pool2d(F.silu(self.conv(x)), 2)
            y = F.avg_pool2d(F.pad(y, (1, 1)), 2)
            y = F.interpolate(y, scale_factor=2)
            return self.block(self.norm(y.flatten(2).mT))

    artifact: Any = graphopt.lower(graphopt.capture(Net().eval(), (randn(1, 3, 16, 16),)), "coreai")
    ops = [str(node.target) for node in artifact.exported.graph.nodes if node.op != "placeholder"]
    kept = ("convolution", "max_pool2d_with_indices", "avg_pool2d", "upsample_nearest2d", "silu")
    kept += ("native_layer_norm", "scaled_dot_product_attention")
    assert all(any(f"aten.{name}." in op for op in ops) for name in kept)
    rewritten = ("index_select", "arange", "gather", "where")
    assert not any(f"aten.{name}." in op for name in rewritten for op in ops)
