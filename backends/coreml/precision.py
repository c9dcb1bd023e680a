"""Computing in float16: what overflows there stays in float32, what stands for infinity is clamped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor, fx
from torch.export import ExportedProgram

from graphopt.backends.precision import FLOAT16_MAX, float32_nodes, overflowing_values

__all__ = ["CLAMP", "clamp_constants", "float16", "register_clamp"]

# coremltools takes constants beyond this one for infinities
_INFINITE = 1e38
CLAMP = "graphopt::clamp_constants_to_float16"


def float16(
    exported: ExportedProgram, keep: Callable[[fx.Node], bool], calls: Iterable[tuple[Tensor, ...]]
) -> Any:
    """Coremltools' precision, with the ops in float32 that overflow.

    Args:
        exported: What is to be converted; its nodes are numbered, so that MIL ops know theirs.
        keep: Ops that compute in float32.
        calls: Inputs to try beside the program's own example.
    """
    import coremltools as ct
    from coremltools.converters.mil.mil.scope import ScopeSource

    numbers = {}
    for number, node in enumerate(exported.graph.nodes, start=1):
        node.meta["debug_handle"] = numbers[node] = number
    overflowing = overflowing_values(exported, [exported.example_inputs[0], *calls])
    wide = {numbers[node] for node in float32_nodes(exported.graph, keep, overflowing)}

    def fits(op: Any) -> bool:
        handles = op.scopes.get(ScopeSource.EXIR_DEBUG_HANDLE) or []
        return not wide.intersection(handles)

    return ct.transform.FP16ComputePrecision(op_selector=fits)


def register_clamp() -> None:
    """Teach coremltools the pass; calling it again does nothing."""
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass

    if CLAMP in PASS_REGISTRY:
        return

    class ClampConstantsToFloat16(AbstractGraphPass):  # type: ignore[misc]
        """The largest float16 for finite constants that float16 has infinities for."""

        def apply(self, prog: Any) -> None:
            for function in prog.functions.values():
                clamp_constants(function)

    ClampConstantsToFloat16.__name__ = CLAMP.split("::")[1]
    register_pass(namespace="graphopt")(ClampConstantsToFloat16)


def clamp_constants(function: Any) -> None:
    """Clamp finite constants of a function that are beyond 1e38: times 0, infinities give NaN."""
    from coremltools.converters.mil.mil import Builder

    for op in list(function.operations):
        value = op.outputs[0].val if op.op_type == "const" else None
        if value is None or np.asarray(value).dtype != np.float32:
            continue
        array = np.asarray(value)
        far = np.isfinite(array) & (np.abs(array) >= _INFINITE)
        if not far.any():
            continue
        clamped = np.where(far, np.sign(array) * np.float32(FLOAT16_MAX), array).astype(np.float32)
        with function:
            new = Builder.const(val=clamped, name=f"{op.name}_clamped", before_op=op)
        function.replace_uses_of_var_after_op(anchor_op=op, old_var=op.outputs[0], new_var=new)
        function.remove_ops([op])
