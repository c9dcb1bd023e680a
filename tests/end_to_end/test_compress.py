"""compress(): one call for palettes and quantized activations, with and without data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import graphopt
from graphopt.errors import CalibrationError, ConfigError, InputError
from graphopt.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.quantization import QuantizerConfig
from graphopt.specs import QuantizationSpec


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.out = nn.Linear(16 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.max_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1))


def example() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = Net()
    batches = [torch.randn(16, 3, 8, 8) + 0.5 for _ in range(4)]
    for batch in batches:
        model(batch)
    return model.eval(), batches


def palettes(n_bits: Any = 2, **fields: Any) -> KMeansPalettizerConfig:
    spec = PalettizationSpec(n_bits=n_bits, **fields)
    return KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )


def error(program: graphopt.Program, model: nn.Module, data: list[Tensor]) -> float:
    compressed = program.module()
    with torch.no_grad():
        parts = [((compressed(x) - model(x)).square().sum(), model(x).square().sum()) for x in data]
    return float(sum(a for a, _ in parts) / sum(b for _, b in parts))


def test_without_a_config_weights_get_four_bit_tables() -> None:
    model, data = example()
    program = graphopt.compress(model, data[0])
    assert {row.n_bits for row in program.report().palettized} == {4}


def test_statistics_are_corrected_where_there_are_data() -> None:
    model, data = example()
    plain = graphopt.compress(model, data[0], palettes(algorithm="kmeans"))
    corrected = graphopt.compress(model, data[0], palettes(algorithm="kmeans"), data)
    off = graphopt.compress(
        model, data[0], palettes(algorithm="kmeans"), data, correct_statistics=False
    )
    assert error(corrected, model, data) < 0.9 * error(plain, model, data)
    assert error(off, model, data) == error(plain, model, data)


def test_output_feedback_and_tuning_each_lower_the_error_on_other_data() -> None:
    model, data = example()
    others = [torch.randn(16, 3, 8, 8) + 0.5 for _ in range(16)]
    errors = [
        error(
            graphopt.compress(model, data[0], palettes(algorithm=name), data, tune_steps=steps),
            model,
            others,
        )
        for name, steps in (("kmeans", 0), ("gptq", 0), ("gptq", 60))
    ]
    assert errors == sorted(errors, reverse=True)


def test_labels_go_to_the_loss_function() -> None:
    model, data = example()
    seen: list[Tensor] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        return F.cross_entropy(output, target)

    labels = [torch.full((16,), number) for number in range(4)]
    pairs = list(zip(data, labels, strict=True))
    program = graphopt.compress(model, data[0], palettes(), pairs, loss)
    assert [int(each[0]) for each in seen] == [0, 1, 2, 3]
    assert len(program.report().palettized) == 2


@pytest.mark.integration
@pytest.mark.coreai
def test_tables_and_quantized_activations_in_one_config_run_on_the_target(tmp_path: Path) -> None:
    model, data = example()
    config = graphopt.JointConfig(
        palettization=palettes(4, algorithm="gptq", lut_qspec=QuantizationSpec(dtype=torch.int8)),
        quantization=QuantizerConfig(),
    )
    program = graphopt.compress(model, data[0], config, data)
    table = program.report()
    assert len(table.palettized) == 2
    assert any(record.status == "quantized" for record in table.activations)
    assert error(program, model, data) < 0.02
    program.save(tmp_path / "m.aimodel")
    artifact = graphopt.lower(program, "coreai")
    artifact.save(tmp_path / "n.aimodel")
    assert artifact.verification.max_error < 0.02


def test_config_comes_from_python_mappings_and_yaml(tmp_path: Path) -> None:
    body = {
        "palettization": {
            "global_config": {"op_state_spec": {"weight": {"n_bits": 2, "algorithm": "kmeans"}}}
        }
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(body))
    model, data = example()
    tables = [
        graphopt.compress(model, data[0], config).report().to_dicts()
        for config in (body, path, palettes(algorithm="kmeans"))
    ]
    assert tables[0] == tables[1] == tables[2]


def test_what_is_wrong_is_named() -> None:
    model, data = example()
    with pytest.raises(ConfigError, match="unknown keys .*'palettes'"):
        graphopt.compress(model, data[0], {"palettes": {}})
    with pytest.raises(ConfigError, match="nothing to do"):
        graphopt.JointConfig()
    with pytest.raises(InputError, match="config must be"):
        graphopt.compress(model, data[0], 3)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="never"):
        graphopt.compress(model, data[0], QuantizerConfig())


def test_the_model_stays_as_it_is() -> None:
    model, data = example()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graphopt.compress(model, data[0], palettes(1, algorithm="gptq"), data, tune_steps=3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
