from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.reference import Reference, compare_outputs
from graphopt.quantization import QuantizerConfig


@pytest.fixture(scope="module")
def rounded() -> Reference:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.Tanh())]
    data = [torch.randn(8, 16) for _ in range(4)]
    program = graphopt.compress(
        nn.Sequential(*layers, nn.Linear(16, 64)),
        (data[0],),
        QuantizerConfig.presets.w8a8(),
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
