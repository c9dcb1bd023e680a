"""Configs of someone else: they import nothing, they end in time, and what is wrong has its path."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import graphopt
from graphopt.errors import ConfigError, GraphOptError
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.quantization import QuantizerConfig


@pytest.fixture
def unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that would end the process if it was imported."""
    (tmp_path / "ends_the_process.py").write_text("import sys\nsys.exit(7)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "ends_the_process"


def test_names_of_classes_import_nothing(unseen: str) -> None:
    config = KMeansPalettizerConfig.from_dict({"module_type_configs": {f"{unseen}.X": None}})
    assert config.module_type_configs == {f"{unseen}.X": None}
    spec = {"op_state_spec": {"weight": {"qparam_calculator_cls": f"{unseen}.X"}}}
    with pytest.raises(ConfigError, match=r"qparam_calculator_cls.*import it first"):
        QuantizerConfig.from_dict({"global_config": spec})
    assert unseen not in sys.modules


def test_names_of_classes_are_imported_where_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from graphopt.observers import MSEObserver\nclass Mine(MSEObserver): ...\n"
    (tmp_path / "my_observers.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    slot = {"*": {"qparam_calculator_cls": "my_observers.Mine"}}
    values = {"global_config": {"op_input_spec": slot}}
    with pytest.raises(ConfigError, match="allow_imports=True"):
        QuantizerConfig.from_dict(values)
    text = io.StringIO(yaml.safe_dump(values))
    config = QuantizerConfig.from_yaml(text, allow_imports=True)
    used = config.global_config.op_input_spec["*"].qparam_calculator_cls
    assert used is sys.modules["my_observers"].Mine


def test_a_type_that_is_imported_is_found_by_any_of_its_names() -> None:
    config = KMeansPalettizerConfig.from_dict({"module_type_configs": {"torch.nn.Linear": None}})
    assert list(config.module_type_configs) == ["torch.nn.modules.linear.Linear"]


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"quantization_config": "int4"}, "quantization_config"),
        ({1: 2}, "1"),
        ({True: None}, "True"),
        ({"global_config": {1: None}}, "quantization_config.global_config"),
        (
            {"global_config": {"op_input_spec": {True: None}}},
            "global_config.op_input_spec.*got True",
        ),
        ({"global_config": "x"}, "quantization_config.global_config"),
        ({"module_name_configs": {3: None}}, "quantization_config.module_name_configs.3"),
        ({"module_type_configs": {None: None}}, "quantization_config.module_type_configs.None"),
        (
            {"global_config": {"op_state_spec": {"weight": {"dtype": "int5"}}}},
            "global_config.op_state_spec.weight.dtype",
        ),
    ],
)
def test_wrong_types_are_named_with_their_path(values: Any, path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        QuantizerConfig.from_dict(values)


def test_numbers_of_slots_come_back_from_files_as_numbers() -> None:
    values = {"global_config": {"op_input_spec": {0: None, "*": {"dtype": "int8"}}}}
    config = QuantizerConfig.from_dict(values)
    for again in (
        QuantizerConfig.from_json(io.StringIO(config.to_json())),
        QuantizerConfig.from_yaml(io.StringIO(config.to_yaml())),
    ):
        assert list(again.global_config.op_input_spec) == [0, "*"]
        assert again == config


@pytest.mark.parametrize("levels", [100, 1_000, 100_000])
def test_deep_configs_are_refused(levels: int) -> None:
    deep = '{"global_config": ' * levels + "null" + "}" * levels
    with pytest.raises(ConfigError):
        KMeansPalettizerConfig.from_json(io.StringIO(deep))
    with pytest.raises(ConfigError):
        KMeansPalettizerConfig.from_yaml(io.StringIO(deep))


def test_values_that_are_deep_without_a_file_are_refused() -> None:
    value: Any = None
    for _ in range(20_000):
        value = {"op_state_spec": value}
    with pytest.raises(ConfigError):
        KMeansPalettizerConfig.from_dict({"global_config": value})


def test_a_pattern_that_takes_for_ever_ends_as_an_error() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("a" * 60, nn.Linear(2, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return getattr(self, "a" * 60)(x)

    config = KMeansPalettizerConfig.from_dict({"module_name_configs": {"(a|aa)+[bc]": None}})
    started = time.perf_counter()
    with pytest.raises(GraphOptError, match="takes longer than"):
        graphopt.compress(Net(), (torch.ones(1, 2),), config)
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize(
    "options",
    [
        {"target_bpw": "x"},
        {"target_bpw": True},
        {"target_bytes": [1]},
        {"pin": [1]},
        {"keep": "no"},
    ],
)
def test_budgets_of_other_types_are_refused(options: dict[str, Any]) -> None:
    from graphopt.mixed_precision import analyze

    table = analyze(nn.Linear(4, 4), (torch.ones(2, 4),), [4], [torch.ones(2, 4)], "mse")
    with pytest.raises(ConfigError, match=next(iter(options))):
        table.recipe(**{"target_bpw": 4.0, **options})


@pytest.mark.parametrize(
    "candidates", [{True: 4}, {1: {"palettize": {}}}, {"a": {1: 2}}, [object()]]
)
def test_candidates_of_strange_keys_are_refused(candidates: Any) -> None:
    with pytest.raises(ConfigError):
        graphopt.mixed_precision.analyze(
            nn.Linear(4, 4), (torch.ones(2, 4),), candidates, [torch.ones(2, 4)], "mse"
        )


def test_json_of_nothing_and_of_numbers_is_refused() -> None:
    for text in ("", "1", "null", json.dumps([1]), '{"a": NaN', "\ufeff{}"):
        with pytest.raises(ConfigError):
            QuantizerConfig.from_json(io.StringIO(text))
