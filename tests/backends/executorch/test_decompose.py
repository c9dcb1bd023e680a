"""Ops without a kernel, and ops that kernels or XNNPACK get wrong, on the ExecuTorch runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiers import cases
from torch import Tensor, nn

import graphopt

pytestmark = pytest.mark.executorch

Function = Callable[[Tensor, Tensor], Tensor]


class All(nn.Module):
    """Every function of a family, in one program."""

    def __init__(self, functions: dict[str, Function]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor, i: Tensor) -> list[Tensor]:
        return [function(x, i) for function in self.functions.values()]


def volume(x: Tensor) -> Tensor:
    return x.reshape(1, 1, 2, 3, 4).expand(1, 2, 2, 3, 4)


def kernel(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape).cos()


FAMILIES: dict[str, dict[str, Function]] = {
    "integers": {
        "remainder": lambda x, i: torch.remainder(i - 3, 4),
        "remainder by negative": lambda x, i: torch.remainder(i, -4),
        "remainder by tensor": lambda x, i: torch.remainder(
            i - 3, torch.tensor([3, -2, 5, 1, 2, 7])
        ),
        "bucketize": lambda x, i: torch.bucketize(x, torch.tensor([-1.0, 0, 1])),
    },
    "order": {
        "sort": lambda x, i: x.sort(-1).values,
        "places": lambda x, i: x.sort(0, descending=True).indices,
        "median": lambda x, i: x.median(1).values,
        "kthvalue": lambda x, i: x.kthvalue(2, 1).values,
        "mode": lambda x, i: i.mode(1).values,
        "histc": lambda x, i: torch.histc(x, 5, -2, 2),
        "quantile": lambda x, i: x.quantile(0.3, 1),
    },
    "running": {
        "cumprod": lambda x, i: x.cumprod(1),
        "cummax": lambda x, i: x.cummax(1).values,
        "logcumsumexp": lambda x, i: x.logcumsumexp(0),
        "std": lambda x, i: x.std(1) + x.var(1),
        "diagonal": lambda x, i: x.diagonal()[:3] * x.trace(),
    },
    "places": {
        "scatter_add": lambda x, i: torch.zeros_like(x).scatter_add(1, i, x),
        "largest": lambda x, i: x.scatter_reduce(1, i, x * 2, "amax"),
        "product": lambda x, i: x.scatter_reduce(1, i, x, "prod", include_self=False),
        "index_add": lambda x, i: x.index_add(0, torch.tensor([0, 0, 3]), x[:3], alpha=2),
        "take": lambda x, i: torch.take(x, i),
        "bag": lambda x, i: F.embedding_bag(i[:, :4] % 4, x, mode="max"),
    },
    "functions": {
        "lgamma": lambda x, i: torch.lgamma(x + 3),
        "erfinv": lambda x, i: torch.erfinv(x / 4),
        "exp2": lambda x, i: torch.exp2(x),
        "copysign": lambda x, i: torch.copysign(x, x.flip(0)),
        "hypot": lambda x, i: torch.hypot(x, x + 1),
        "fmax": lambda x, i: torch.fmax(x, -x) + torch.fmin(x, x.flip(1)),
        "heaviside": lambda x, i: torch.heaviside(x, x[0]),
        "logaddexp": lambda x, i: torch.logaddexp(x, x.flip(0)),
        "multigammaln": lambda x, i: torch.mvlgamma(x + 5, 2),
    },
    "images": {
        "odd resize": lambda x, i: F.interpolate(
            x[None, None, :3, :5], scale_factor=1.5, mode="bilinear"
        ),
        "cubic resize": lambda x, i: F.interpolate(x[None, None], scale_factor=1.7, mode="bicubic"),
        "adaptive maximum": lambda x, i: F.adaptive_max_pool2d(x[None], (3, 2)),
        "slopes": lambda x, i: F.prelu(x, torch.arange(6.0)) + F.prelu(x, torch.ones(1) / 3),
        "cut": lambda x, i: F.pad(x, (-1, 2, 1, -1)),
        "volume": lambda x, i: F.conv3d(volume(x), kernel(3, 2, 2, 2, 2), kernel(3), padding=1),
        "transposed volume": lambda x, i: F.conv_transpose3d(
            volume(x), kernel(2, 3, 2, 2, 2), kernel(3), stride=2, output_padding=1
        ),
        "one image": lambda x, i: F.avg_pool2d(x[None], 2) + F.max_pool2d(x[None], 2),
        "volume pooling": lambda x, i: F.max_pool3d(volume(x), 2) + F.avg_pool3d(volume(x), 2),
    },
}


@pytest.mark.integration
@pytest.mark.parametrize(
    "family", cases(FAMILIES, default=lambda name: name not in ("images", "functions"))
)
def test_what_has_no_kernel_runs_as_in_pytorch(family: str, tmp_path: Path) -> None:
    functions = FAMILIES[family]
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    i = torch.arange(24).reshape(4, 6) % 6
    artifact: Any = graphopt.lower(graphopt.capture(All(functions), (x, i)), "executorch")
    artifact.save(tmp_path / "net.pte")
    errors = dict(zip(functions, artifact.verify().outputs, strict=True))
    assert not {name: error for name, error in errors.items() if error > 1e-4}


@pytest.mark.integration
def test_what_xnnpack_takes_whole_stays_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Hardswish(), nn.Linear(8, 8)).eval()
    artifact: Any = graphopt.lower(graphopt.capture(model, (torch.randn(2, 8),)), "executorch")
    assert artifact.delegation.outside == {}
    assert artifact.delegation.inside["aten.linear.default"] == 2


@pytest.mark.integration
def test_largest_values_of_images_along_every_axis(tmp_path: Path) -> None:
    """XNNPACK's partitioner takes them all, and what converts them a height and a width that are kept."""

    class Largest(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            kept = [x.max(dim, True).values for dim in range(-4, 4)]
            gone = [x.max(dim).values for dim in range(4)]
            return [*kept, *gone, *x.max(2), *x.max(1, True)]

    x = torch.randn(2, 3, 4, 5)
    artifact: Any = graphopt.lower(Largest().eval(), "executorch", (x,))
    artifact.save(tmp_path / "net.pte")
    assert artifact.verify().outputs == (0.0,) * 16


@pytest.mark.integration
def test_both_forms_of_gelu_are_themselves(tmp_path: Path) -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return F.gelu(x), F.gelu(x, approximate="tanh")

    # they differ by 5e-4 here, which a comparison of outputs up to 5 would not see
    artifact: Any = graphopt.lower(
        Both().eval(), "executorch", (torch.linspace(-5, 5, 2001)[None],)
    )
    artifact.save(tmp_path / "net.pte")
    assert artifact.verification.max_error < 1e-6
