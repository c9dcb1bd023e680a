"""Long fits hold a limit of memory, and go on where they were killed with the same bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import ConfigError, InputError
from graphopt.fitting import fitted_layers
from graphopt.ir.program import Program
from graphopt.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.quantization import QuantizerConfig


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


SPEC = PalettizationSpec(n_bits=3, algorithm="gptq")
CONFIGS: dict[str, Any] = {
    "tables": KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": SPEC})
    ),
    "integers": QuantizerConfig.presets.w4(),
}


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return graphopt.capture(Net().eval(), (torch.randint(20, (4, 8)),))


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(20, (4, 8)) for _ in range(2)]


def fitted(program: Program, kind: str, data: list[Tensor], **options: Any) -> dict[str, Tensor]:
    made = graphopt.compress(program, None, CONFIGS[kind], calibration_data=data, **options)
    return made.graph_module.state_dict()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_fit_that_was_killed_goes_on_at_the_last_layer_with_the_same_bytes(
    kind: str, program: Program, data: list[Tensor], tmp_path: Path, monkeypatch: Any
) -> None:
    expected = fitted(program, kind, data)
    made: list[int] = []
    run_tasks = fitted_layers.run_tasks

    def counted(function: Any, tasks: Any, *rest: Any, **options: Any) -> Any:
        def told() -> Any:
            for task in tasks:
                if len(made) == 2:
                    raise Killed
                made.append(1)
                yield task

        return run_tasks(function, told(), *rest, **options)

    monkeypatch.setattr(fitted_layers, "run_tasks", counted)
    with pytest.raises(Killed):
        fitted(program, kind, data, work_dir=tmp_path)
    first = hashlib.sha256(b"layers.0.weight").hexdigest()[:32]
    damaged = tmp_path / kind / f"{first}.pt"
    damaged.write_bytes(damaged.read_bytes()[:-3] + b"abc")
    made[:] = [0] * 5  # no second kill
    found = fitted(program, kind, data, work_dir=tmp_path)
    assert len(made) - 5 == 2  # the damaged one and the third
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(InputError, match="other data"):
        fitted(program, kind, data[:1], work_dir=tmp_path)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_limit_of_memory_changes_no_bytes(
    kind: str, program: Program, data: list[Tensor], tmp_path: Path
) -> None:
    expected = fitted(program, kind, data)
    found = fitted(program, kind, data, activation_memory="1KB")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_limits_are_sizes(program: Program, data: list[Tensor]) -> None:
    with pytest.raises(ConfigError, match="no size"):
        fitted(program, "tables", data, activation_memory="plenty")
