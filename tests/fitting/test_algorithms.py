from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import torch
from torch import nn

import graphopt
from graphopt.fitting import algorithms as algorithms_module
from graphopt.fitting.algorithms import (
    ALGORITHMS,
    CALIBRATED,
    CALIBRATED_INTEGERS,
    INTEGER_ALGORITHMS,
    FittingAlgorithm,
)
from graphopt.fitting.calibration import (
    Calibrator,
    algorithms_of,
    shapes_to_weigh,
    without_data,
)
from graphopt.fitting.evidence import Evidence, Integers, Palettes
from graphopt.ir.program import Program
from graphopt.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.passes import AnnotatePalettization, AnnotateQuantization
from graphopt.passes.pass_manager import run_passes
from graphopt.quantization import QuantizationSpec, QuantizerConfig
from graphopt.schemes.palettize import PalettizedWeight


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


@pytest.mark.parametrize(
    ("spec", "algorithms", "calibrated"),
    [
        (PalettizationSpec, ALGORITHMS, CALIBRATED),
        (QuantizationSpec, INTEGER_ALGORITHMS, CALIBRATED_INTEGERS),
    ],
)
def test_every_word_of_a_spec_is_an_algorithm_in_the_file_of_that_name(
    spec: Any, algorithms: dict[str, FittingAlgorithm[Any]], calibrated: str
) -> None:
    named = get_args(spec.model_fields["algorithm"].annotation)
    assert list(named) == ["auto", *algorithms]
    assert calibrated in algorithms
    for name, algorithm in algorithms.items():
        assert algorithm.name == name
        assert type(algorithm).__module__ == f"graphopt.fitting.algorithms.{name}"


def test_every_file_of_an_algorithm_has_its_word_in_a_spec() -> None:
    folder = Path(algorithms_module.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "base"}
    assert files == {*ALGORITHMS, *INTEGER_ALGORITHMS}


def test_nearest_integers_are_those_of_the_scheme() -> None:
    program = graphopt.capture(Net().eval(), (torch.randn(2, 8),))
    config = QuantizerConfig.from_dict(
        {"global_config": {"op_state_spec": {"weight": {"dtype": "int4"}}}}
    )
    run_passes(program.graph_module, [AnnotateQuantization(config)])
    fit = Integers()
    INTEGER_ALGORITHMS["nearest"].fit(program, ["first.weight"], Evidence(), fit)
    assert list(fit.weights) == ["first.weight"]
    weight = program.graph_module.get_parameter("first.weight").detach()
    scale = weight.abs().max() / 7.5  # the range of int4, which clips nothing
    expected = (weight / fit.weights["first.weight"].scale).round().clamp(-8, 7)
    dense = fit.weights["first.weight"].dense()
    torch.testing.assert_close(dense, expected * fit.weights["first.weight"].scale)
    assert float((dense - weight).abs().max()) <= float(scale)


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


class Shared(nn.Module):
    """Weights of every kind of reader: one op, two ops, one op beside outliers."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice, self.around = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.around(self.twice(self.twice(self.once(x)).relu()).relu())


def test_auto_with_data_is_the_best_that_readers_and_outliers_allow() -> None:
    def module(**options: Any) -> ModuleKMeansPalettizerConfig:
        spec = PalettizationSpec(n_bits=2, **options)
        return ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})

    config = KMeansPalettizerConfig(
        global_config=module(), module_name_configs={"around": module(outlier_fraction=0.05)}
    )
    program = graphopt.capture(Shared().eval(), (torch.randn(2, 8),))
    run_passes(program.graph_module, [AnnotatePalettization(config)])
    expected = {"once.weight": "gptq", "twice.weight": "skm", "around.weight": "skm"}
    assert algorithms_of(program) == expected


def test_an_algorithm_of_ones_own_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], int, set[str]]] = []

    class Remembering(FittingAlgorithm[PalettizedWeight]):
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
