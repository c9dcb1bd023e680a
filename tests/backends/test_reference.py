from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.reference import Reference, compare_outputs
from graphopt.quantization import QuantizationSpec, QuantizerConfig


@pytest.fixture(scope="module")
def rounded() -> Reference:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.Tanh())]
    data = [torch.randn(8, 16) for _ in range(4)]
    config = QuantizerConfig.presets.w8a8()
    config.global_config.module_output_spec["*"] = QuantizationSpec()
    program = graphopt.compress(
        nn.Sequential(*layers, nn.Linear(16, 64)),
        (data[0],),
        config,
        calibration_data=data,
    )
    return Reference(program, [((data[1],), {})], "float32")


def held(reference: Reference, output: Tensor) -> bool:
    (want, *_), *_ = reference.values
    (error,) = compare_outputs([output], [want])
    return reference.holds(0, 0, output, error)


def test_outputs_with_the_noise_of_roundings_hold(rounded: Reference) -> None:
    (want, *_), *_ = rounded.values
    run = rounded._dithered()[0][0][0]
    assert not torch.equal(run, want)
    assert held(rounded, run)


def test_an_error_of_that_size_everywhere_does_not_hold(rounded: Reference) -> None:
    (want, *_), *_ = rounded.values
    largest = float((rounded._dithered()[0][0][0] - want).abs().max())
    assert not held(rounded, want + 1.5 * largest)


class Chosen(nn.Module):
    """Takes a row where a label says so, or where a value crosses a threshold."""

    def __init__(self, *, by_label: bool) -> None:
        super().__init__()
        self.by_label = by_label

    def forward(self, x: Tensor) -> Tensor:
        labels = torch.cat([torch.ones_like(x[:1, 0]), -torch.ones(x.shape[0] - 1)])
        # on the threshold itself: rounding decides
        near = x[:, 0] / 3 * 3 >= x[:, 0]
        return torch.where(((labels == -1) if self.by_label else near)[:, None], x, -x)


@pytest.mark.parametrize("by_label", [True, False])
def test_what_whole_numbers_decide_is_not_left_to_rounding(by_label: bool) -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    model = Chosen(by_label=by_label).eval()
    reference = Reference(graphopt.capture(model, (x,)), [((x,), {})], "float32")
    other = torch.where((torch.arange(64) == 1)[:, None], -model(x), model(x))
    assert held(reference, model(x))
    assert held(reference, other) is not by_label


def test_rounding_inside_of_a_recurrent_layer_in_16_bits_is_allowed_for() -> None:
    layer = nn.RNN(1, 1, nonlinearity="relu", bias=False, batch_first=True).half().eval()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.fill_(1.0)
    x = torch.rand(1, 200, 1, generator=torch.Generator().manual_seed(0)).half()
    reference = Reference(graphopt.capture(layer, (x,)), [((x,), {})], "float16")
    with torch.no_grad():
        found = layer(x)[0].double()
    ((want, *_),) = reference.values
    (error,) = compare_outputs([found], [want])
    assert error > 2e-3
    assert reference.holds(0, 0, found, error)
    farther = want.double() + 5 * (found - want.double())
    assert not reference.holds(0, 0, farther, 5 * error)
