"""Complex numbers are computed as real and imaginary parts where a target has none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.function_nets import Part
from torch import Tensor, nn

import graphopt
from graphopt.backends.complex_numbers import in_real_parts
from graphopt.backends.complex_parts import ComplexAsParts, is_complex
from graphopt.errors import LoweringError

fft, real = torch.fft, torch.view_as_real
WINDOW = torch.hann_window(16)


def z(x: Tensor, y: Tensor | None = None) -> Tensor:
    return torch.complex(x, x + 1 if y is None else y)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "rfft": lambda x: real(fft.rfft(x)),
    "irfft": lambda x: fft.irfft(fft.rfft(x) * 2, norm="ortho"),
    "irfft of an odd size": lambda x: fft.irfft(fft.rfft(x), n=7),
    "fft2": lambda x: fft.fft2(x).imag,
    "ifft2": lambda x: fft.ifft2(fft.fft2(x, norm="ortho"), norm="forward").abs(),
    "irfft2": lambda x: fft.irfft2(fft.rfft2(x), s=x.shape[-2:]),
    "fftn": lambda x: fft.fftn(x, dim=(0, 2)).real,
    "hfft": lambda x: fft.hfft(z(x)),
    "fftshift": lambda x: fft.fftshift(fft.fft(x)).abs(),
    "long convolution": lambda x: fft.irfft(fft.rfft(x, n=16) * fft.rfft(x.flip(-1), n=16), n=16),
    "stft": lambda x: torch.stft(x.flatten(1), 16, 4, window=WINDOW, return_complex=True).abs(),
    "angle": lambda x: z(x).angle(),
    "conj": lambda x: (z(x) * z(x).conj()).real,
    "matmul": lambda x: real(z(x) @ z(x, -x).transpose(1, 2)),
    "einsum": lambda x: torch.einsum("bij,bkj->bik", z(x), z(x, -x)).abs(),
    "polar": lambda x: real(torch.polar(x.abs(), x)),
    "exp": lambda x: real(torch.exp(z(x * 0.1, x))),
    "quotient": lambda x: real(z(x) / z(x * 2, x - 3)),
    "reciprocal": lambda x: real(1 / z(x, x + 3)),
    "cat": lambda x: real(torch.cat([z(x), z(x, -x)], 1)),
    "stack and sum": lambda x: real(torch.stack([z(x), z(x, -x)], 1).sum(1)),
    "where": lambda x: real(torch.where(x > 0, z(x), z(x, -x))),
    "chunk": lambda x: real(z(x).chunk(2, -1)[1]),
    "places": lambda x: real(z(x)[:, [0, 2], 1:3]),
    "pad": lambda x: real(F.pad(z(x), (1, 2))),
    "square of zero": lambda x: real((z(x) * 0) ** 2),
    "cube": lambda x: real(z(x) ** 3),
    "numbers": lambda x: real(3 - (z(x) * 2j + 1) / 4),
    "sum with a factor": lambda x: real(torch.add(z(x), z(x, -x), alpha=2)),
    "real factors": lambda x: real(z(x)[:, None].expand(-1, 3, -1, -1) * x[:, None]),
    "roll and flip": lambda x: real(torch.roll(torch.flip(z(x), [-1]), 1, -1)),
    "root and logarithm": lambda x: real(torch.sqrt(z(x)) + torch.log(z(x))),
    "equal": lambda x: (z(x) == z(x, x + x.sign().clamp(min=0))).float(),
    "cast": lambda x: real(x.to(torch.complex64) * z(x)),
    "zeros": lambda x: real(torch.zeros(8, dtype=torch.complex64) + z(x)),
    "norm": lambda x: torch.linalg.vector_norm(z(x), dim=-1),
}


class Rotary(nn.Module):
    """Attention with rotations as they were first published, and a spectral layer of complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.spectrum = nn.Parameter(torch.randn(5, 32, dtype=torch.complex64) / 6)
        rates = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
        angles = torch.outer(torch.arange(64.0), rates)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return real(pairs * self.turns[: x.shape[2]]).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.turned(parts[0]), self.turned(parts[1]), parts[2])
        y = self.out(y.transpose(1, 2).flatten(2))
        return y + fft.irfft(fft.rfft(x, dim=1) * self.spectrum, n=8, dim=1)


def captured(function: Callable[[Tensor], Any]) -> tuple[graphopt.Program, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8)
    return graphopt.capture(Part(function).eval(), (x,)), x


def has_complex(program: graphopt.Program) -> bool:
    return any(is_complex(node.meta.get("val")) for node in program.graph_module.graph.nodes)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parts_give_what_complex_numbers_give(name: str) -> None:
    program, x = captured(FUNCTIONS[name])
    before = str(program.graph_module.graph)
    made = in_real_parts(program, "none")
    assert has_complex(program)
    assert str(program.graph_module.graph) == before
    assert not has_complex(made)
    want = FUNCTIONS[name](x.double()) if name != "stft" else FUNCTIONS[name](x)
    got = made.graph_module(x)
    scale = want.abs().max().clamp(min=1)
    assert float((got - want).abs().max() / scale) < 2e-6


def test_sizes_stay_open_where_no_transform_needs_them() -> None:
    program, _ = captured(lambda x: real(z(x) * z(x, -x)).sum(-2))
    made = in_real_parts(program, "none")
    other = torch.randn(3, 5, 8)
    assert torch.allclose(made.graph_module(other), program.graph_module(other), atol=1e-5)


def test_transforms_leave_other_sizes_open() -> None:
    x = torch.randn(2, 40)
    shapes = ({0: torch.export.Dim("samples", max=8)},)
    program = graphopt.capture(
        Part(lambda x: torch.stft(x, 16, 4, window=WINDOW, return_complex=True).abs()).eval(),
        (x,),
        dynamic_shapes=shapes,
    )
    made = in_real_parts(program, "none")
    assert not has_complex(made)
    other = torch.randn(5, 40)
    assert torch.allclose(made.graph_module(other), program.graph_module(other), atol=1e-5)


def test_pass_is_one_that_any_manager_runs() -> None:
    program, x = captured(lambda x: real(z(x) * z(x, -x)))
    want = program.graph_module(x)
    assert ComplexAsParts()(program.graph_module).modified
    assert torch.allclose(program.graph_module(x), want, atol=1e-6)
    assert not ComplexAsParts()(program.graph_module).modified


def test_what_a_target_holds_is_left_alone() -> None:
    transform, _ = captured(lambda x: fft.rfft(x).abs())
    product, _ = captured(lambda x: z(x).abs())
    assert in_real_parts(transform, "transforms") is transform
    assert in_real_parts(product, "transforms") is not product
    assert in_real_parts(product, "all") is product


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(fft.rfft, id="complex result"),
        pytest.param(lambda x: torch.linalg.eigvals(x @ x.mT).abs(), id="unknown op"),
    ],
)
def test_what_has_no_parts_is_refused_by_name(function: Callable[[Tensor], Any]) -> None:
    program, _ = captured(function)
    assert in_real_parts(program, "none") is program
    with pytest.raises(LoweringError, match="complex|eigvals"):
        graphopt.lower(program, "coreai")


TARGETS = [
    pytest.param(name, suffix, marks=getattr(pytest.mark, name))
    for name, suffix in (
        ("coreai", "aimodel"),
        ("coreml", "mlpackage"),
        ("executorch", "pte"),
        ("onnx", "onnx"),
    )
]


@pytest.mark.integration
@pytest.mark.parametrize(("target", "suffix"), TARGETS)
def test_networks_with_complex_numbers_are_saved_and_right(
    target: str, suffix: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Rotary().eval(), torch.randn(2, 8, 32)
    small = graphopt.compress(model, (x,), {"palettization": {}}, backend=target)
    options = {"precision": "float32"} if target in ("coreai", "coreml") else {}
    artifact = graphopt.lower(small, target, **options)
    artifact.save(tmp_path / f"net.{suffix}")
    assert artifact.verification.max_error < 1e-5
