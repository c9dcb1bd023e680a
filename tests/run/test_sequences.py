"""Sequences of calls: state is kept within one, and every way to run a graph starts from the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.palettized_nets import uniform
from helpers.state_nets import STATEFUL
from torch import Tensor, nn

import graphopt
from graphopt.errors import InputError
from graphopt.ir.captured_module import CapturedModule
from graphopt.palettization import PalettizationSpec
from graphopt.quantization import (
    ModuleQuantizerConfig,
    QuantizationSpec,
    Quantizer,
    QuantizerConfig,
)
from graphopt.run.batches import CallSequence, StatefulCall, run_call
from graphopt.run.calibration_data import read_calls
from graphopt.run.interpreter import Interpreter
from graphopt.run.layerwise import LayerwiseRun
from graphopt.run.partial_rerun import PartialRerun, RerunPlan

NAMES = ["index_copy cache", "sliding window", "ring buffer", "GRU", "counters"]


def in_pytorch(name: str) -> list[Tensor]:
    model = STATEFUL[name].model()
    with torch.no_grad():
        outputs = [model(*call) for call in STATEFUL[name].calls]
    return [given[0] if isinstance(given, tuple) else given for given in outputs]


def captured(name: str) -> tuple[CapturedModule, list[Any]]:
    case = STATEFUL[name]
    program = graphopt.capture(case.model(), case.calls[0], dynamic_shapes=None)
    return program.graph_module, list(read_calls(program.graph_module, [CallSequence(case.calls)]))


@pytest.mark.parametrize("name", NAMES)
def test_calls_of_a_sequence_give_the_models_outputs_in_any_order(name: str) -> None:
    gm, calls = captured(name)
    expected = in_pytorch(name)
    assert all(isinstance(call, StatefulCall) for call in calls)
    plan = RerunPlan(gm)
    order = list(enumerate(zip(calls, expected, strict=True)))
    for _, (call, want) in reversed(order):
        for found in (
            Interpreter(gm).run(call)[0],
            PartialRerun(plan, call).reference()[0],
            PartialRerun(plan, call).exact(plan.results()[0]),
        ):
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
        given = run_call(gm, call)
        first = given[0] if isinstance(given, tuple) else given
        torch.testing.assert_close(first, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_layerwise_run_of_a_sequence_is_that_of_the_model(name: str) -> None:
    gm, calls = captured(name)
    run = LayerwiseRun(gm, calls)
    output = run.interpreter.results()[0]
    for node in run.interpreter.nodes:
        if node.op != "output":
            run.step(node, keep_inputs=True)
    for found, want in zip(run.values(output), in_pytorch(name), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_reading_a_sequence_leaves_the_state_as_it_was() -> None:
    gm, _ = captured("counters")
    assert gm.calls.item() == 70000


class Growing(nn.Module):
    """Each call gives more than the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)
        self.register_buffer("sum", torch.zeros(1, 4))
        nn.init.eye_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        self.sum.add_(x.mean(0, keepdim=True))
        return self.fc(self.sum)


def largest(data: list[Any]) -> float:
    x = torch.ones(1, 4)
    spec = QuantizationSpec(dtype="uint8", qparam_calculator_cls="global_minmax")
    slots = {"*": spec}
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_input_spec=slots, op_output_spec=slots)
    )
    quantizer = Quantizer(Growing().eval(), config)
    quantizer.prepare((x,))
    quantizer.calibrate(data)
    return max(
        float(torch.as_tensor(part.scale).max())
        for part in quantizer.summary().activations
        if part.scale is not None
    )


def test_activations_are_observed_within_sequences_and_not_across() -> None:
    x = torch.ones(1, 4)
    alone = largest([x] * 4)
    sequence = largest([CallSequence([x] * 4)])
    twice = largest([CallSequence([x] * 4), CallSequence([x] * 4)])
    assert sequence == pytest.approx(4 * alone, rel=0.02)
    assert twice == pytest.approx(sequence, rel=0.02)


@pytest.mark.parametrize("algorithm", ["skm", "gptq"])
def test_fits_use_what_a_sequence_makes_of_the_state(algorithm: Any) -> None:
    # only the third call of the sequence has anything in the last rows of the cache
    torch.manual_seed(0)
    case = STATEFUL["ring buffer"]
    config = uniform(PalettizationSpec(n_bits=2, algorithm=algorithm))
    fitted = {
        name: graphopt.compress(case.model(), case.calls[0], config, calibration_data=data)
        for name, data in {
            "sequence": [CallSequence(case.calls)],
            "calls": list(case.calls),
        }.items()
    }
    errors = {}
    for name, made in fitted.items():
        module = made.module()
        with torch.no_grad():
            outputs = torch.cat([module(*call) for call in case.calls])
        errors[name] = float((outputs - torch.cat(in_pytorch("ring buffer"))).square().mean())
    assert errors["sequence"] != errors["calls"]
    assert errors["sequence"] < 1.5 * errors["calls"]
    assert torch.equal(fitted["sequence"].module().ring, torch.zeros(4, 32))


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        CallSequence([])
