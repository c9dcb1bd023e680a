"""The state of ExecuTorch programs, which the runtime keeps from call to call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.export import ExportedProgram

from graphopt.backends.data_sizes import refuse_data_sizes
from graphopt.backends.executorch.check import lacking_kernels
from graphopt.backends.quiet import silent
from graphopt.errors import LoweringError

__all__ = ["executorch_config", "set_buffer"]


def set_buffer(methods: Mapping[str, Any], partitioners: Callable[[str], list[Any]]) -> bytes:
    """The bytes of a program with several methods, which share constants and state.

    Each buffer that several methods write has one place in an arena of its own, which is the same
    memory for all methods of a loaded program. Loading a method writes the initial values there, so
    that all are loaded before the first call.

    Args:
        methods: Name → artifact, each lowered for XNNPACK or for portable kernels.
        partitioners: Those of a delegate.

    Raises:
        LoweringError: Another delegate holds the methods, or they cannot be converted.
    """
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    delegates = {str(each.options.get("delegate", "xnnpack")) for each in methods.values()}
    if delegates - {"xnnpack", "portable"}:
        raise LoweringError(
            f"{sorted(delegates)} as a delegate has one entry point; lower to that target itself, or"
            " with delegate='xnnpack'"
        )
    (delegate,) = delegates
    with silent() as said:
        try:
            edge = to_edge_transform_and_lower(
                {name: each.exported for name, each in methods.items()},
                partitioner={name: partitioners(delegate) for name in methods},
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            names = [name for each in methods.values() for name in _state_inputs(each.exported)]
            manager = edge.to_executorch(_config(names, shared=bool(names)))
            buffer = bytes(manager.buffer)
        except Exception as error:
            for each in methods.values():
                refuse_data_sizes(each.exported, "ExecuTorch")
            raise LoweringError(
                f"ExecuTorch cannot convert {list(methods)}: {error}\n{said()}"
            ) from error
        lacking = lacking_kernels(manager.executorch_program.execution_plan)
    if lacking:
        raise LoweringError(f"the ExecuTorch runtime has no kernel for {', '.join(lacking)}")
    return buffer


def executorch_config(exported: ExportedProgram) -> Any:
    """How the last step of ExecuTorch's conversion is made: state starts from its initial values.

    What is not named there starts as whatever the runtime's memory holds.

    Args:
        exported: What is converted.
    """
    return _config(_state_inputs(exported))


def _config(names: list[str], *, shared: bool = False) -> Any:
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass

    return ExecutorchBackendConfig(
        passes=[InitializedMutableBufferPass(names)] if names else [],
        memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=shared),
    )


def _state_inputs(exported: ExportedProgram) -> list[str]:
    signature = exported.graph_signature
    mutated = set(signature.buffers_to_mutate.values())
    return [name for name, buffer in signature.inputs_to_buffers.items() if buffer in mutated]
