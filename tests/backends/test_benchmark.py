from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends import Device
from graphopt.backends.benchmark import bytes_moved, multiply_adds
from graphopt.errors import InputError, StateError
from graphopt.palettization import KMeansPalettizerConfig


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, groups=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.depthwise(self.conv(x)).mean((2, 3))
        y = self.fc(y)
        return y @ y.T


_X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def _compressed() -> graphopt.Program:
    config = KMeansPalettizerConfig.presets.w4()
    return graphopt.compress(_Net().eval(), (_X,), config)


def test_multiply_adds_are_those_of_the_layers() -> None:
    expected = 2 * (36 * 8 * 27 + 16 * 8 * 9 + 8 * 5 + 2 * 5)
    assert multiply_adds(graphopt.capture(_Net().eval(), (_X,)), ((_X,), {})) == expected
    assert multiply_adds(_compressed(), ((_X,), {})) == expected


def test_bytes_are_those_of_operands_and_results() -> None:
    # conv, depthwise, mean, fc, product: weights are counted as the file stores them
    inputs = (2 * 3 * 36, 2 * 8 * 36, 2 * 8 * 16, 2 * 8, 2 * (2 * 5))
    results = (2 * 8 * 36, 2 * 8 * 16, 2 * 8, 2 * 5, 2 * 2)
    program = graphopt.capture(_Net().eval(), (_X,))
    moved = bytes_moved(program, ((_X,), {}))
    # the transposed operand of the product is a view, read once more
    assert moved == pytest.approx(4 * (sum(inputs) + sum(results)), abs=4 * 10)
    assert bytes_moved(_compressed(), ((_X,), {})) == moved
    assert bytes_moved(program, ((_X,), {}), width=2) == moved // 2


def test_program_in_a_file_is_timed(tmp_path: Path) -> None:
    artifact = graphopt.lower(_compressed(), "torch")
    with pytest.raises(StateError):
        artifact.benchmark()
    artifact.save(tmp_path / "net.pt2")
    outcome = artifact.benchmark(runs=3)
    assert outcome.measured
    assert 0 < outcome.fastest <= outcome.milliseconds
    assert outcome.file_bytes == artifact.size
    assert outcome.bytes_moved > artifact.size
    larger = artifact.benchmark(torch.cat([_X, _X]), runs=1)
    assert larger.multiply_adds > outcome.multiply_adds
    with pytest.raises(InputError, match="runs"):
        artifact.benchmark(runs=0)
    with pytest.raises(InputError, match="m1, m2"):
        artifact.benchmark(device="toaster")


def test_longer_of_work_and_traffic_is_the_estimate() -> None:
    device = Device("one of ours", operations=1e9, bandwidth=1e6)
    assert device.milliseconds(1e6, 0) == pytest.approx(1.0)
    assert device.milliseconds(1e6, 1e4) == pytest.approx(10.0)


@pytest.mark.integration
@pytest.mark.parametrize("target", ["executorch", "onnx", "coreai"])
def test_targets_are_timed_or_estimated(target: str, tmp_path: Path) -> None:
    artifact = graphopt.lower(_compressed(), target)
    artifact.save(tmp_path / f"net{artifact.suffix}", verify=False)
    device = Device("one of ours", operations=1e9, bandwidth=1e9)
    outcome = artifact.benchmark(runs=2, device=device)
    assert outcome.measured == (target != "coreai")
    assert (outcome.planned_memory is not None) == (target == "executorch")
    if target == "coreai":
        work = 2e3 * outcome.multiply_adds / 1e9
        assert outcome.milliseconds == pytest.approx(max(work, 1e3 * outcome.bytes_moved / 1e9))
        assert "one of ours" in str(outcome)
        assert "estimate" in str(outcome)
