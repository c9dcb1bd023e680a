"""Tuning on a device: the same bits on the CPU, the same errors elsewhere, and a note where it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.devices import DEVICES
from helpers.tuned_nets import BLOCKS, changed, compressed, example, output_error
from torch import Tensor, nn

from graphopt.compressors.flow import joint_pipeline
from graphopt.compressors.options import CompressOptions
from graphopt.config.joint import JointConfig
from graphopt.errors import InputError
from graphopt.fitting import tuning
from graphopt.passes.tune import Tune, tune
from graphopt.quantization import Quantizer, QuantizerConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def same(device: str, found: Any, expected: Any) -> None:
    """The same tensors on the CPU, where they lay before."""
    state = found.graph_module.state_dict()
    assert {value.device.type for value in state.values()} == {"cpu"}
    if device == "cpu":
        assert changed(found, expected) == set()


@DEVICES
@pytest.mark.parametrize("blocks", BLOCKS)
def test_tuned_tables_are_as_good_as_without_a_device(blocks: Any, device: str) -> None:
    model, data = example("cnn")
    program, reference = compressed(model, data[0])
    how: dict[str, Any] = {"steps": 12, "blocks": blocks, "progress": False}
    here = tune(program, reference, data, **how)
    there = tune(program, reference, data, **how, device=device)
    same(device, there, here)
    found, expected = (output_error(each, reference, data) for each in (there, here))
    assert changed(there, program) != set()
    assert found == pytest.approx(expected, rel=0.05)


class Counting(nn.Module):
    """It makes tensors of its own, names their device, and has rounded activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x + torch.arange(8.0, device=x.device)).relu())


@DEVICES
def test_scales_of_activations_are_tuned_there(device: str) -> None:
    torch.manual_seed(0)
    model, data = Counting().eval(), [torch.randn(8, 8) for _ in range(4)]
    made = []
    for place in (None, device):
        quantizer = Quantizer(model, QuantizerConfig.presets.w8a8())
        quantizer.prepare((data[0],))
        quantizer.calibrate(data)
        made.append(quantizer.program(tune_steps=12, device=place))
    same(device, made[1], made[0])
    assert str(made[1].graph_module.graph) == str(made[0].graph_module.graph) or device != "cpu"
    with torch.no_grad():
        errors = [sum((each.module()(x) - model(x)).square().mean() for x in data) for each in made]
    assert float(errors[1]) == pytest.approx(float(errors[0]), rel=0.05)


def test_a_device_without_a_kernel_is_said_and_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = example("mlp")
    program, reference = compressed(model, data[0])
    expected = tune(program, reference, data, steps=5, progress=False)
    real = tuning._tune_block

    def refusing(tuned: Any, goals: Any, options: Any, *rest: Any) -> Any:
        if options.device is not None:
            tuned.run.gm.first.bias.data.add_(1)  # what it has done there must not stay
            raise NotImplementedError("no kernel for 'aten::relu'\nmore")
        return real(tuned, goals, options, *rest)

    monkeypatch.setattr(tuning, "_tune_block", refusing)
    found = tune(program, reference, data, steps=5, progress=False, device="cpu")
    assert changed(found, expected) == set()
    said = "cpu cannot tune it (no kernel for 'aten::relu'); tuned where its tensors are"
    assert said in found.report().warnings
    assert said in caplog.text


def test_other_errors_stay_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = example("mlp")
    program, reference = compressed(model, data[0])

    def failing(*_: Any) -> Any:
        raise TypeError("a mistake")

    monkeypatch.setattr(tuning, "_tune_block", failing)
    with pytest.raises(TypeError, match="a mistake"):
        tune(program, reference, data, steps=5, progress=False, device="cpu")


def test_devices_that_are_not_here_are_refused_before_any_work() -> None:
    with pytest.raises(InputError, match="device='nonsense' cannot be used here"):
        tune(None, None, [], device="nonsense")  # type: ignore[type-var]


def test_the_flow_hands_its_device_to_tuning() -> None:
    joint = JointConfig(quantization=QuantizerConfig.presets.w8a8())
    how = CompressOptions(tune_steps=3, device="cpu")
    pipeline = joint_pipeline("tuned", joint, [torch.zeros(1, 8)] * 4, options=how)
    (step,) = [each for each in pipeline.passes if isinstance(each, Tune)]
    assert step.device == "cpu"
