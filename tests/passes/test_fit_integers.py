"""Quantized weights by error feedback, on the inputs that their layers get."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt import pipelines
from graphopt.config.quantization import ModuleQuantizerConfig
from graphopt.errors import CalibrationError
from graphopt.passes import AnnotateQuantization, FitIntegers
from graphopt.prepared.findings import findings_of
from graphopt.quantization import QuantizationSpec, Quantizer, QuantizerConfig
from graphopt.specs import PerBlockGranularity


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 8)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-0.2, 0.2)
            self.norm.weight.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(F.relu(self.norm(self.conv(x))), 4).flatten(1)
        return self.b(F.relu(self.a(y)))


def images(seed: int, count: int = 64) -> Tensor:
    """Smooth ones, so that features correlate."""
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, (8, 8), mode="bilinear")


DATA, FRESH = [images(1), images(2), images(3)], images(9)


def config(
    algorithm: str, *, activations: bool = True, granularity: object = None
) -> QuantizerConfig:
    base = QuantizerConfig.presets.w4a8(block_size=16).global_config
    assert base is not None
    weight = QuantizationSpec(
        dtype="int4",
        granularity=granularity or PerBlockGranularity(block_size=16),
        algorithm=algorithm,
    )
    slots = {} if activations else {"op_input_spec": None, "op_output_spec": None}
    given = base.op_input_spec if activations else {}
    filled = {"op_input_spec": given, "op_output_spec": given} if activations else slots
    return QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_state_spec={"weight": weight}, **filled)
    )


def error(model: nn.Module, made: nn.Module) -> float:
    with torch.no_grad():
        want = model(FRESH)
        return float((made(FRESH) - want).norm() / want.norm())


@pytest.mark.parametrize("activations", [True, False], ids=["w4a8", "w4"])
def test_feedback_is_ahead_of_rounding_to_the_nearest(activations: bool) -> None:
    model = Net().eval()
    errors = {}
    for algorithm in ("nearest", "gptq", "auto"):
        wanted = config(algorithm, activations=activations)
        program = graphopt.compress(model, (DATA[0],), wanted, DATA)
        errors[algorithm] = error(model, program.module())
    assert errors["gptq"] < 0.75 * errors["nearest"]
    assert errors["auto"] == errors["gptq"]


def test_pipeline_and_quantizer_find_the_same() -> None:
    model, wanted = Net().eval(), config("gptq")
    program = pipelines.quantize(wanted, DATA).run(model, (DATA[0],))
    quantizer = Quantizer(model, wanted)
    prepared = quantizer.prepare((DATA[0],))
    quantizer.calibrate(DATA)
    made = quantizer.finalize(backend="torch")
    torch.testing.assert_close(made(FRESH), program.module()(FRESH), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(prepared(FRESH), made(FRESH), rtol=1e-5, atol=1e-6)
    with quantizer.training_mode():
        F.mse_loss(prepared(DATA[0]), torch.zeros(64, 8)).backward()
        torch.optim.SGD(prepared.parameters(), 1e-2).step()
    torch.testing.assert_close(quantizer.finalize(backend="torch")(FRESH), prepared(FRESH))


def test_algorithm_that_needs_data_says_so() -> None:
    with pytest.raises(CalibrationError, match="no data for algorithm 'gptq'"):
        pipelines.quantize(config("gptq", activations=False)).run(Net().eval(), (DATA[0],))
    pipelines.quantize(config("auto", activations=False)).run(Net().eval(), (DATA[0],))


def test_pass_alone_leaves_findings_and_corrects_biases() -> None:
    gm = graphopt.capture(Net().eval(), (DATA[0],)).graph_module
    AnnotateQuantization(config("gptq", activations=False))(gm)
    before = gm.get_parameter("a.bias").detach().clone()
    FitIntegers(DATA)(gm)
    found = findings_of(gm).stored
    assert {"a.weight", "b.weight"} <= set(found)
    assert not torch.equal(gm.get_parameter("a.bias"), before)
    assert found["a.weight"].storage == "int4"
