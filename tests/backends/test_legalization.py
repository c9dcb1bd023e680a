"""Every pass that prepares a program for a target computes what it computed before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends import load_backend
from graphopt.errors import LoweringError
from graphopt.passes import RemoveUnused
from graphopt.pipelines import PassManager


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 32)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))
        return self.head(torch.relu(self.fc(y)))


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
INT8_TABLES = {"op_state_spec": {"weight": {"n_bits": 3, "lut_qspec": {"dtype": "int8"}}}}
INT4 = {
    "op_state_spec": {"weight": {"dtype": "int4"}},
    "op_input_spec": None,
    "op_output_spec": None,
}
CONFIGS: dict[str, Any] = {
    "tables": {"palettization": {}},
    "int8 tables": {"palettization": {"global_config": INT8_TABLES}},
    "W8A8": {"quantization": {}},
    "tables and activations": {"palettization": {}, "quantization": {}},
    "int4": {"quantization": {"global_config": INT4}},
    "pruned tables": {"pruning": {}, "palettization": {}},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("target", "form"),
    [
        pytest.param("coreai", None, marks=pytest.mark.coreai),
        pytest.param("coreml", None, marks=pytest.mark.coreml),
        pytest.param("executorch", "auto", marks=pytest.mark.executorch),
        pytest.param("executorch", "compressed", marks=pytest.mark.executorch),
    ],
)
def test_passes_of_targets_verify(name: str, target: str, form: str | None) -> None:
    program = graphopt.compress(Net().eval(), (X,), CONFIGS[name], calibration_data=[X])
    gm = program.copy().graph_module
    backend: Any = load_backend(target)
    passes = backend.legalize() if form is None else backend.legalize(form)
    report = PassManager([RemoveUnused(), *passes], verify=True, example_inputs=X).run(gm)
    # coremltools takes our ops as they are
    assert report.modified or target == "coreml"
    assert all(record.error is not None for record in report)


@pytest.mark.integration
@pytest.mark.parametrize(
    "target",
    [pytest.param(t, marks=getattr(pytest.mark, t)) for t in ("coreai", "coreml", "executorch")],
)
def test_values_whose_sizes_depend_on_data_are_refused_by_name(target: str) -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.combinations(x * 2, 1)

    program = graphopt.capture(Chosen(), (torch.randn(4),))
    with pytest.raises(LoweringError, match="size of its result depends on data") as refused:
        graphopt.lower(program, target)
    assert "aten.unsqueeze" not in str(refused.value)  # only sizes of what it is given
