"""The state of ExecuTorch programs, which the runtime keeps from call to call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch.export import ExportedProgram

from graphopt.backends.quiet import silent
from graphopt.errors import LoweringError
from graphopt.ir.state import state_of

__all__ = ["executorch_config", "set_buffer"]


def set_buffer(methods: Mapping[str, Any], partitioners: Callable[[str], list[Any]]) -> bytes:
    """The bytes of a program with several methods, which share the constants that they hold.

    Args:
        methods: Name → artifact, each lowered for XNNPACK or for portable kernels.
        partitioners: Those of a delegate.

    Raises:
        LoweringError: Methods write the same state, whose memory the runtime gives each of its own,
            or another delegate holds them.
    """
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    owners = Counter(
        name for each in methods.values() for name in state_of(each.program.graph_module)
    )
    shared = [name for name, count in owners.items() if count > 1]
    if shared:
        raise LoweringError(
            f"{shared[0]}: state of several methods, of which ExecuTorch's runtime gives each its own;"
            " use one entry point whose length is open (shapes={'x': {1: (1, 128)}}), or take the"
            " state as an input and return it"
        )
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
            return bytes(edge.to_executorch(_config(names)).buffer)
        except Exception as error:
            raise LoweringError(
                f"ExecuTorch cannot convert {list(methods)}: {error}\n{said()}"
            ) from error


def executorch_config(exported: ExportedProgram) -> Any:
    """How the last step of ExecuTorch's conversion is made: state starts from its initial values.

    What is not named there starts as whatever the runtime's memory holds.

    Args:
        exported: What is converted.
    """
    return _config(_state_inputs(exported))


def _config(names: list[str]) -> Any:
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass

    passes = [InitializedMutableBufferPass(names)] if names else []
    return ExecutorchBackendConfig(passes=passes)


def _state_inputs(exported: ExportedProgram) -> list[str]:
    signature = exported.graph_signature
    mutated = set(signature.buffers_to_mutate.values())
    return [name for name, buffer in signature.inputs_to_buffers.items() if buffer in mutated]
