"""Computing in float16: what overflows there stays in float32, what stands for infinity is clamped."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

__all__ = ["CLAMP", "clamp_constants", "float16", "register_clamp"]

_LARGEST = float(torch.finfo(torch.float16).max)
# coremltools takes constants beyond this one for infinities
_INFINITE = 1e38
CLAMP = "graphopt::clamp_constants_to_float16"


class _Recorder(fx.Interpreter):
    """Runs a graph and notes which nodes give what float16 cannot hold."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.beyond: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if any(_beyond(leaf) for leaf in pytree.tree_leaves(result)):
            self.beyond.add(n)
        return result


def _beyond(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.dtype is not torch.float32 or not value.numel():
        return False
    size = value.abs()
    return bool(((size > _LARGEST) & (size < _INFINITE)).any())


def float16(exported: ExportedProgram) -> Any:
    """Coremltools' precision, with the ops in float32 that overflow on the example inputs.

    Args:
        exported: What is to be converted; its nodes are numbered, so that MIL ops know theirs. Its
            own example has the form of the target's interface, which the model's need not have.
    """
    import coremltools as ct
    from coremltools.converters.mil.mil.scope import ScopeSource

    kept = _overflowing(exported)

    def fits(op: Any) -> bool:
        handles = op.scopes.get(ScopeSource.EXIR_DEBUG_HANDLE) or []
        return not kept.intersection(handles)

    return ct.transform.FP16ComputePrecision(op_selector=fits)


def _overflowing(exported: ExportedProgram) -> set[int]:
    """Numbers of the nodes that give or read what float16 cannot hold."""
    names = {}
    for number, node in enumerate(exported.graph.nodes, start=1):
        node.meta["debug_handle"] = number
        names[node.name] = number
    recorder = _Recorder(exported.graph_module)
    given = iter(pytree.tree_leaves(exported.example_inputs))
    state = exported.state_dict | exported.constants
    targets = [spec.target for spec in exported.graph_signature.input_specs]
    feeds = [next(given) if target is None else state[target] for target in targets]
    with torch.no_grad():
        recorder.run(*feeds)
    readers = {user for node in recorder.beyond for user in node.users}
    return {names[node.name] for node in recorder.beyond | readers if node.op == "call_function"}


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
        clamped = np.where(far, np.sign(array) * np.float32(_LARGEST), array).astype(np.float32)
        with function:
            new = Builder.const(val=clamped, name=f"{op.name}_clamped", before_op=op)
        function.replace_uses_of_var_after_op(anchor_op=op, old_var=op.outputs[0], new_var=new)
        function.remove_ops([op])
