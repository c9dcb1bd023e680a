"""Core ML's own plan for a saved model, on macOS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graphopt.backends.compute_plan import ComputePlan, PlannedOp
from graphopt.backends.quiet import quiet
from graphopt.extras import require

__all__ = ["plan_of"]


def plan_of(path: Path) -> ComputePlan:
    """The devices that Core ML prefers for the ops of a package, and its estimate of their cost.

    Args:
        path: An .mlpackage of one function.

    Raises:
        Exception: What coremltools raises where Core ML is not there or too old (before macOS 14.4).
    """
    with quiet("coremltools"):
        ct = require("coremltools", "coreml")
        from coremltools.models import compute_device
        from coremltools.models.compute_plan import MLComputePlan

        # the compiled model lasts as long as this object
        model = ct.models.MLModel(str(path))
        plan = MLComputePlan.load_from_path(model.get_compiled_model_path())
    kinds = (
        (compute_device.MLNeuralEngineComputeDevice, "Neural Engine"),
        (compute_device.MLGPUComputeDevice, "GPU"),
        (compute_device.MLCPUComputeDevice, "CPU"),
    )

    def name_of(device: Any) -> str:
        return next((name for kind, name in kinds if isinstance(device, kind)), "unknown")

    ops = []
    for function in plan.model_structure.program.functions.values():
        for op in _ops(function.block):
            usage = plan.get_compute_device_usage_for_mlprogram_operation(op)
            if usage is None:  # a constant
                continue
            cost = plan.get_estimated_cost_for_mlprogram_operation(op)
            device = name_of(usage.preferred_compute_device)
            able = dict.fromkeys(map(name_of, usage.supported_compute_devices))
            name = op.outputs[0].name if op.outputs else op.operator_name
            share = None if cost is None else float(cost.weight)
            others = tuple(each for each in able if each != device)
            ops.append(PlannedOp(name, op.operator_name, device, share, others))
    return ComputePlan(tuple(ops), "Core ML's compute plan and estimated costs")


def _ops(block: Any) -> Iterator[Any]:
    """The ops of a block, each before those of the blocks inside it."""
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from _ops(inner)
