"""Models that ask for something unusual of ExecuTorch: each runs as in PyTorch, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiers import cases, some
from torch import Tensor, nn

import graphopt
from graphopt.backends.lowering import as_program
from graphopt.errors import LoweringError
from graphopt.palettization import KMeansPalettizer
from graphopt.quantization import Quantizer

pytestmark = pytest.mark.executorch


class Calls(nn.Module):
    """A function of some layers and the inputs."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def error(program: Any, folder: Path, **options: Any) -> float:
    artifact = graphopt.lower(program, "executorch", **options)
    artifact.save(folder / "model.pte", overwrite=True)
    return artifact.verification.max_error


def quantized(model: nn.Module, *inputs: Tensor) -> Any:
    quantizer = Quantizer(model.eval())
    quantizer.prepare(inputs, backend="executorch")
    quantizer.calibrate([inputs])
    return quantizer.program()


def palettized(model: nn.Module, *inputs: Tensor) -> Any:
    palettizer = KMeansPalettizer(model.eval())
    palettizer.prepare(inputs)
    return palettizer.program()


# --- one bias for several layers ------------------------------------------------------------------
def shared_bias(first: nn.Module, second: nn.Module) -> nn.Module:
    second.bias = first.bias
    return nn.Sequential(first, nn.ReLU(), second)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("delegate", "kind"),
    cases(
        ["xnnpack", "portable"],
        ["a layer twice", "two linear layers", "two convolutions"],
        default=lambda delegate, kind: (delegate, kind) == ("xnnpack", "a layer twice"),
    ),
)
def test_layers_that_share_a_bias_scale_it_each_for_itself(
    kind: str, delegate: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32)
    layer = nn.Linear(32, 32)
    model: nn.Module = nn.Sequential(layer, nn.ReLU(), layer)
    if kind == "two linear layers":
        model = shared_bias(layer, nn.Linear(32, 32))
    elif kind == "two convolutions":
        model = shared_bias(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
        x = torch.randn(2, 4, 8, 8)
    assert error(quantized(model, x), tmp_path, delegate=delegate) < 1e-2  # a step of int8


# --- layers that need another form ----------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tables"),
    cases(
        [nn.LSTM, nn.GRU],
        ["compressed", "int8", "dense"],
        default=lambda kind, tables: (kind, tables) == (nn.LSTM, "int8"),
    ),
)
def test_recurrent_layers_with_biases_run(
    kind: Callable[..., nn.Module], tables: str, tmp_path: Path
) -> None:
    model = Calls(lambda self, x: self.layer(x)[0], layer=kind(16, 32, batch_first=True))
    program = palettized(model, torch.randn(2, 5, 16))
    assert error(program, tmp_path, tables=tables) < 1e-5


@pytest.mark.integration
@pytest.mark.parametrize("tables", ["compressed", "auto"])
def test_convolution_of_one_image_without_a_batch_runs(tables: str, tmp_path: Path) -> None:
    program = palettized(nn.Conv2d(16, 32, 3, padding=1), torch.randn(16, 9, 9))
    assert error(program, tmp_path, delegate="portable", tables=tables) < 1e-5


@pytest.mark.slow
def test_layout_of_decoded_convolutions_is_that_of_convolutions(tmp_path: Path) -> None:
    # pixel_shuffle is exported to other ops for other strides
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(4, 4, 3))
    program = palettized(model, torch.randn(2, 4, 8, 8))
    for delegate in ("xnnpack", "portable"):
        assert error(program, tmp_path, delegate=delegate, tables="compressed") < 1e-5


@pytest.mark.integration
@pytest.mark.parametrize("groups", some([1, 4], lambda groups: groups == 4))
@pytest.mark.parametrize(
    "kind", some([nn.ConvTranspose1d, nn.ConvTranspose2d], lambda kind: kind is nn.ConvTranspose2d)
)
def test_transposed_convolutions_of_integers_run(
    kind: Callable[..., nn.Module], groups: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 9) if kind is nn.ConvTranspose1d else torch.randn(2, 16, 9, 9)
    program = quantized(kind(16, 32, 4, stride=2, groups=groups), x)
    assert error(program, tmp_path) < 1e-2


class GeneralConvolution(nn.Module):
    """`aten.convolution`, as other exporters write every convolution."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        places = ([1, 1], [1, 1], [1, 1], self.transposed, [0, 0], 1)
        return torch.ops.aten.convolution(x, self.weight, self.bias, *places)


@pytest.mark.integration
@pytest.mark.parametrize("transposed", [False, True])
def test_general_convolution_is_computed_with_integers(transposed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = quantized(GeneralConvolution(transposed=transposed), torch.randn(2, 16, 9, 9))
    artifact = graphopt.lower(program, "executorch")
    assert artifact.delegation.notes == ()
    assert not artifact.delegation.outside
    artifact.save(tmp_path / "model.pte")
    assert artifact.verification.max_error < 2e-2


@pytest.mark.integration
@pytest.mark.parametrize("tables", some(["auto", "compressed"], lambda form: form == "compressed"))
def test_tables_of_the_general_convolution_run(tables: str, tmp_path: Path) -> None:
    program = palettized(GeneralConvolution(transposed=False), torch.randn(2, 16, 9, 9))
    assert error(program, tmp_path, tables=tables) < 1e-4


# --- values and types -----------------------------------------------------------------------------
@pytest.mark.integration
@pytest.mark.parametrize("delegate", some(["xnnpack", "portable"], lambda name: name == "xnnpack"))
def test_clamps_keep_their_types_and_ends(delegate: str, tmp_path: Path) -> None:
    model = Calls(
        lambda self, x, i: (self.f(x) * i.clamp(0.5, 20.5), self.f(x).clamp(1.0, -1.0)),
        f=nn.Linear(8, 8),
    )
    program = as_program(model.eval(), (torch.randn(2, 8), torch.arange(16).reshape(2, 8)))
    assert error(program, tmp_path, delegate=delegate) < 1e-5


@pytest.mark.integration
@pytest.mark.parametrize("delegate", some(["xnnpack", "portable"], lambda name: name == "xnnpack"))
def test_examples_in_another_layout_are_read_in_order(delegate: str, tmp_path: Path) -> None:
    image = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last)
    assert error(as_program(nn.Conv2d(8, 8, 3), image), tmp_path, delegate=delegate) < 1e-5
    turned = torch.randn(32, 2).t()
    assert error(as_program(nn.Linear(32, 8), turned), tmp_path, delegate=delegate) < 1e-5


@pytest.mark.integration
def test_weight_that_is_an_output_too_is_stored_apart(tmp_path: Path) -> None:
    model = Calls(lambda self, x: (self.f(x), self.f.bias), f=nn.Linear(8, 8))
    assert error(as_program(model.eval(), torch.randn(2, 8)), tmp_path) < 1e-5


@pytest.mark.integration
@pytest.mark.parametrize(
    "tables", some(["int8", "compressed", "dense"], lambda form: form == "compressed")
)
def test_tables_of_16_bit_models_run(tables: str, tmp_path: Path) -> None:
    program = palettized(nn.Linear(32, 48).half(), torch.randn(2, 32).half())
    assert error(program, tmp_path, tables=tables) < 5e-3


# --- refusals -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_integers_in_16_bit_models_are_refused(dtype: torch.dtype) -> None:
    program = quantized(nn.Linear(32, 48).to(dtype), torch.randn(2, 32).to(dtype))
    with pytest.raises(LoweringError, match="quantize a float32 model"):
        graphopt.lower(program, "executorch")


@pytest.mark.integration
def test_ops_without_a_kernel_are_refused_by_name() -> None:
    net = Calls(lambda self, x: torch.gcd(x, x + self.n), n=torch.tensor(2))
    with pytest.raises(LoweringError, match="gcd"):
        graphopt.lower(as_program(net.eval(), torch.arange(8)), "executorch")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delegate": "coreml", "precision": "fp16"}, "precision must be"),
        ({"delegate": "coreai", "precision": "int"}, "precision must be"),
        ({"delegate": "coreml", "tables": "dense"}, "is for xnnpack and portable"),
        ({"tables": ["auto"]}, "tables must be one of"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    program = as_program(nn.Linear(8, 8).eval(), torch.randn(2, 8))
    with pytest.raises(LoweringError, match=message):
        graphopt.lower(program, "executorch", **options)
