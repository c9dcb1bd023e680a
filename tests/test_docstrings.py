"""Docstrings of the public names: there is one, with an example, and the example runs.

Examples are run with `torch`, `graphopt`, the name itself and small models in several forms at hand, as
`examples/guide/api.md` says.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.mixed_precision import SensitivityTable, analyze
from graphopt.rdo import Optimized, optimize

PACKAGES = (
    *("graphopt", "graphopt.backends", "graphopt.casting", "graphopt.common", "graphopt.config"),
    *("graphopt.coreai_utils", "graphopt.coreml_utils", "graphopt.errors", "graphopt.inspection"),
    *("graphopt.ir.op_info", "graphopt.mixed_precision", "graphopt.observers", "graphopt.ops"),
    *("graphopt.palettization", "graphopt.palettization.config", "graphopt.palettization.spec"),
    *("graphopt.passes", "graphopt.pipelines", "graphopt.pruning", "graphopt.pruning.config"),
    *("graphopt.pruning.spec", "graphopt.quantization", "graphopt.quantization.config"),
    *("graphopt.quantization.spec", "graphopt.rdo", "graphopt.specs", "graphopt.torchao"),
)


def public() -> Iterator[tuple[str, str, Any]]:
    """(package, name, object) of every public class and function, once."""
    seen: set[int] = set()
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and id(value) not in seen:
                seen.add(id(value))
                yield package, name, value


def has_example(value: Any) -> bool:
    return ">>>" in (inspect.getdoc(value) or "")


def examples() -> list[Any]:
    """What is run; with its markers where that goes through a toolchain."""
    integration = {
        "graphopt.coreai_utils": (pytest.mark.integration, pytest.mark.coreai),
        "graphopt.coreml_utils": (pytest.mark.integration, pytest.mark.coreml),
        "graphopt.torchao": (pytest.mark.integration, pytest.mark.executorch),
        "graphopt.rdo": (pytest.mark.integration,),
    }
    return [
        pytest.param(package, name, value, marks=marks, id=f"{package}.{name}")
        for package, name, value in public()
        if has_example(value)
        for marks in [integration.get(package, ())]
    ]


def test_every_public_name_is_documented() -> None:
    assert [f"{package}.{name}" for package, name, value in public() if not value.__doc__] == []


def test_every_public_name_has_an_example() -> None:
    assert [
        f"{package}.{name}" for package, name, value in public() if not has_example(value)
    ] == []


class AtHand:
    """What examples may use; what takes time is made where an example names it, and once."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        self.batches = [torch.randn(8, 16) for _ in range(2)]
        self.example = (torch.randn(1, 16),)

    @cached_property
    def program(self) -> graphopt.Program:
        return graphopt.capture(self.model, self.example)

    @cached_property
    def compressed(self) -> graphopt.CompressedProgram:
        return graphopt.compress(self.model, self.example, {"palettization": {}})

    @cached_property
    def convolutional(self) -> graphopt.Program:
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        return graphopt.capture(net, torch.randn(2, 3, 8, 8))

    @cached_property
    def sensitivities(self) -> SensitivityTable:
        return analyze(self.model, self.example, [2, 4, 6], self.batches)

    @cached_property
    def optimized(self) -> Optimized:
        config = {"target_bits": 8, "rounding": {"blocks": "none"}}
        return optimize(self.model, self.example, self.batches, config)

    def of(self, text: str) -> dict[str, Any]:
        """The names that a text uses; examples may change what is a graph."""
        made = {name for name, value in vars(AtHand).items() if isinstance(value, cached_property)}
        names = {"model", "batches", "example", *(made & set(re.findall(r"\w+", text)))}
        values = {name: getattr(self, name) for name in names}
        for name, value in values.items():
            if isinstance(value, graphopt.Program):
                values[name] = replace(value, graph_module=value.module())
        return {"torch": torch, "graphopt": graphopt, **values}


@pytest.fixture(scope="module")
def at_hand() -> AtHand:
    return AtHand()


@pytest.mark.parametrize(("package", "name", "value"), examples())
def test_example_runs(
    package: str,
    name: str,
    value: Any,
    at_hand: AtHand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(value) or ""
    example = doctest.DocTestParser().get_doctest(
        text, {**at_hand.of(text), name: value}, f"{package}.{name}", None, None
    )
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)
