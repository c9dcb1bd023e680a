"""Core ML's compute plan, from coremltools' classes on a stand-in of the library that macOS has."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.backends import Artifact, compute_plan
from graphopt.backends.coreml.plan import plan_of
from graphopt.errors import VerificationError

pytestmark = [pytest.mark.coreml, pytest.mark.integration]


class _Device:
    """Any of the three proxies of devices."""


class _CPU(_Device):
    pass


class _GPU(_Device):
    pass


class _NeuralEngine(_Device):
    pass


class _Plan:
    """libcoremlpython's `_MLComputePlanProxy`: convolutions and their inner ops on the Neural Engine."""

    def __init__(self, structure: Any) -> None:
        self.model_structure = structure

    def get_compute_device_usage_for_mlprogram_operation(self, op: Any) -> Any:
        from coremltools.models import compute_device as devices
        from coremltools.models.compute_plan import MLComputePlanDeviceUsage

        if op.operator_name == "const" or op.operator_name.startswith("constexpr"):
            return None
        cpu, engine = (
            devices.MLCPUComputeDevice(_CPU()),
            devices.MLNeuralEngineComputeDevice(_NeuralEngine()),
        )
        if op.operator_name == "conv":
            return MLComputePlanDeviceUsage(engine, [cpu, engine])
        return MLComputePlanDeviceUsage(cpu, [cpu])

    def get_estimated_cost_for_mlprogram_operation(self, op: Any) -> Any:
        from coremltools.models.compute_plan import MLComputePlanCost

        costs = {"conv": 0.75, "linear": 0.25}
        weight = costs.get(op.operator_name)
        return None if weight is None else MLComputePlanCost(weight)


class _Model:
    """libcoremlpython's `_MLModelProxy`, which gives a plan for the ops that the package holds."""

    refuses: Exception | None = None
    tells: Exception | None = None
    structure: Any = None
    calls: list[dict[str, Any]]

    def __init__(self, path: str, *options: Any) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.path = path

    @staticmethod
    def maximum_supported_specification_version() -> int:
        return 99

    def get_compiled_model_path(self) -> str:
        return self.path

    def predict(self, data: dict[str, Any], state: Any) -> dict[str, Any]:
        self.calls.append(data)
        return {}

    @classmethod
    def get_compute_plan(cls, path: str, units: str) -> Any:
        from coremltools.models.compute_plan import MLComputePlan

        if cls.tells is not None:
            raise cls.tells
        return MLComputePlan(_Plan(cls.structure or _structure(path)))


def _op(kind: str, output: str, *inner: Any) -> Any:
    from coremltools.models import compute_plan as plans

    named = plans.MLModelStructureProgramNamedValueType(
        output, plans.MLModelStructureProgramValueType()
    )
    blocks = [plans.MLModelStructureProgramBlock([], list(inner), [])] if inner else []
    return plans.MLModelStructureProgramOperation({}, kind, [named], blocks, None)


def _program(*ops: Any) -> Any:
    from coremltools.models import compute_plan as plans

    function = plans.MLModelStructureProgramFunction(
        [], plans.MLModelStructureProgramBlock([], list(ops), [])
    )
    program = plans.MLModelStructureProgram({"main": function})
    return plans.MLModelStructure(None, program, None)


def _structure(path: str) -> Any:
    """The structure of a package, as the framework gives it."""
    return _program(*(_op(op.type, op.outputs[0].name) for op in _operations(path)))


def _operations(path: str | Path) -> list[Any]:
    import coremltools as ct

    (block,) = (
        ct.utils.load_spec(str(path)).mlProgram.functions["main"].block_specializations.values()
    )
    return [op for op in block.operations if op.outputs]


@pytest.fixture
def macos(monkeypatch: pytest.MonkeyPatch) -> type[_Model]:
    """A machine whose Core ML answers."""
    from coremltools.models import compute_device, model
    from coremltools.models import compute_plan as plans

    class Model(_Model):
        calls: list[dict[str, Any]] = []

    for module in (model, plans):
        monkeypatch.setattr(module, "_MLModelProxy", Model)
    monkeypatch.setattr(plans, "_MLComputePlanProxy", _Plan)
    for name, kind in (("CPU", _CPU), ("GPU", _GPU), ("NeuralEngine", _NeuralEngine)):
        monkeypatch.setattr(compute_device, f"_ML{name}ComputeDeviceProxy", kind)
    monkeypatch.setattr(compute_plan, "platform", SimpleNamespace(system=lambda: "Darwin"))
    return Model


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(16, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(pixels).relu().flatten(1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    program = graphopt.compress(_Net().eval(), (torch.randn(2, 1, 4, 4),), {"palettization": {}})
    artifact = graphopt.lower(program, "coreml")
    artifact.save(tmp_path_factory.mktemp("saved") / "net.mlpackage", verify=False)
    return artifact


def test_benchmark_says_which_device_computes_each_op(saved: Artifact, macos: type[_Model]) -> None:
    outcome = saved.benchmark(runs=2)
    assert outcome.measured
    assert len(macos.calls) == 4  # two of them warm up
    assert macos.calls[0]["pixels"].shape == (2, 1, 4, 4)
    plan = outcome.plan
    assert plan is not None
    assert saved.path is not None
    ops = {op.outputs[0].name: op.type for op in _operations(saved.path)}
    work = {name: kind for name, kind in ops.items() if not kind.startswith("const")}
    assert {op.name: op.kind for op in plan.ops} == work
    (conv,) = plan.on("Neural Engine")
    assert (conv.kind, conv.share, conv.others) == ("conv", 0.75, ("CPU",))
    assert plan.share("CPU") == 0.25
    assert "Neural Engine 1 op, 75 %" in str(outcome)


def test_ops_of_inner_blocks_are_told(saved: Artifact, macos: type[_Model]) -> None:
    macos.structure = _program(_op("const", "w"), _op("cond", "y", _op("conv", "z")))
    assert saved.path is not None
    plan = plan_of(saved.path)
    assert [(op.name, op.device) for op in plan.ops] == [("y", "CPU"), ("z", "Neural Engine")]


def test_system_that_tells_no_plan_still_times(
    saved: Artifact, macos: type[_Model], caplog: pytest.LogCaptureFixture
) -> None:
    macos.tells = RuntimeError("MLComputePlan needs macOS 14.4")
    with caplog.at_level(logging.WARNING):
        outcome = saved.benchmark(runs=1)
    assert (outcome.measured, outcome.plan) == (True, None)
    assert "Core ML tells no compute plan here: RuntimeError: MLComputePlan needs" in caplog.text


def test_package_that_core_ml_refuses_is_named(saved: Artifact, macos: type[_Model]) -> None:
    macos.refuses = RuntimeError("newer than this system")
    with pytest.raises(VerificationError, match="net.mlpackage does not load in Core ML"):
        saved.benchmark(runs=1)


def test_elsewhere_it_is_an_estimate_without_a_plan(saved: Artifact) -> None:
    if compute_plan.on_macos():
        pytest.skip("Core ML is here")
    outcome = saved.benchmark(device="m4")
    assert (outcome.measured, outcome.plan) == (False, None)
    assert "roofline of Apple M4" in str(outcome)
