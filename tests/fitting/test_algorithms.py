from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, get_args

import pytest
import torch
from torch import nn

import graphopt
from graphopt.fitting.algorithms import ALGORITHMS, CALIBRATED, FittingAlgorithm
from graphopt.fitting.calibration import Calibrator, shapes_to_weigh, without_data
from graphopt.fitting.evidence import Evidence, Palettes
from graphopt.ir.program import Program
from graphopt.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.passes import AnnotatePalettization
from graphopt.passes.pass_manager import run_passes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def annotated(algorithm: Any) -> Program:
    program = graphopt.capture(Net().eval(), (torch.randn(2, 8),))
    spec = PalettizationSpec(n_bits=2, algorithm=algorithm)
    module = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    run_passes(
        program.graph_module, [AnnotatePalettization(KMeansPalettizerConfig(global_config=module))]
    )
    return program


def test_a_spec_names_the_algorithms_that_there_are() -> None:
    named = get_args(PalettizationSpec.model_fields["algorithm"].annotation)
    assert set(named) == {"auto", *ALGORITHMS}
    assert CALIBRATED in ALGORITHMS
    assert all(name == algorithm.name for name, algorithm in ALGORITHMS.items())


@pytest.mark.parametrize(
    ("algorithm", "weighed", "waits"),
    [
        ("auto", (), False),
        ("kmeans", (), False),
        ("skm", (), True),
        ("skm", ("first.weight", "second.weight"), False),
        ("gptq", (), True),
        ("gptq", ("first.weight", "second.weight"), True),
    ],
)
def test_what_an_algorithm_needs_is_known_before_it_runs(
    algorithm: str, weighed: tuple[str, ...], waits: bool
) -> None:
    program = annotated(algorithm)
    waiting = without_data(program.graph_module, weighed)
    assert len(waiting) == (2 if waits else 0)
    watched = {} if algorithm == "kmeans" else {"first.weight", "second.weight"}
    assert set(shapes_to_weigh(program)) == set(watched)


def test_an_algorithm_of_ones_own_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], int, set[str]]] = []

    class Remembering(FittingAlgorithm):
        name: ClassVar[str] = "gptq"
        needs_inputs: ClassVar[bool] = True

        def fit(
            self, annotated: Program, names: Sequence[str], evidence: Evidence, result: Palettes
        ) -> None:
            asked.append((list(names), len(evidence.batches), set(evidence.saliency)))
            result.remarks.append("seen")

    monkeypatch.setitem(ALGORITHMS, "gptq", Remembering())
    program = annotated("gptq")
    calibrator = Calibrator(program)
    module = program.copy().graph_module
    with calibrator.watching(module):
        for _ in range(3):
            calibrator.step(module(torch.randn(4, 8)))
    found = calibrator.palettes(0, False, correct_bias=True)
    assert found.remarks == ["seen"]
    ((names, batches, nodes),) = asked
    assert names == ["first.weight", "second.weight"]
    assert batches == 3
    assert nodes == {"linear", "linear_1"}
