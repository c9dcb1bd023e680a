"""Execute saved ExecuTorch programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from graphopt.backends.quiet import silent
from graphopt.errors import VerificationError
from graphopt.extras import require

__all__ = ["lacking_kernels", "run_calls", "run_methods", "run_program"]


def run_program(path: Path, inputs: Sequence[Any]) -> list[Tensor]:
    """Outputs of one call of a saved program; see `run_calls`."""
    return run_calls(path, [inputs])[0]


def run_calls(path: Path, calls: Sequence[Sequence[Any]]) -> list[list[Tensor]]:
    """Outputs of calls of a saved program, one behind the other; see `run_methods`."""
    return run_methods(path, [("forward", inputs) for inputs in calls])


def run_methods(path: Path, calls: Sequence[tuple[str, Sequence[Any]]]) -> list[list[Tensor]]:
    """Execute the program at `path` on the ExecuTorch runtime, which keeps its state between calls.

    Args:
        path: A .pte.
        calls: (method, flat inputs) of each call, with the types and shapes that the program was
            lowered with.

    Returns:
        For each call its outputs in the program's order.

    Raises:
        VerificationError: The runtime refuses the program or the inputs.
    """
    with silent() as said:
        require("executorch.runtime", "executorch")
        require("executorch.kernels.quantized", "executorch")
        from executorch.runtime import Runtime

        try:
            program = Runtime.get().load_program(str(path))
            methods = {
                name: program.load_method(name) for name in dict.fromkeys(n for n, _ in calls)
            }
            results = []
            for name, inputs in calls:
                flat = [x.detach().contiguous() if isinstance(x, Tensor) else x for x in inputs]
                outputs = methods[name].execute(flat)
                # the next call writes where these are
                results.append([output.clone() for output in outputs if isinstance(output, Tensor)])
        except Exception as error:
            raise VerificationError(
                f"{path.name} does not run on the ExecuTorch runtime: {error}\n{said()}"
            ) from error
        return results


def runner_of(path: Path, inputs: Sequence[Any]) -> Callable[[], object]:
    """A function that executes one call of a loaded program.

    Args:
        path: A .pte with the method "forward".
        inputs: Its flat inputs.

    Raises:
        VerificationError: The runtime refuses the program.
    """
    with silent() as said:
        require("executorch.runtime", "executorch")
        require("executorch.kernels.quantized", "executorch")
        from executorch.runtime import Runtime

        try:
            program = Runtime.get().load_program(str(path))
            method = program.load_method("forward")
        except Exception as error:
            raise VerificationError(
                f"{path.name} does not run on the ExecuTorch runtime: {error}\n{said()}"
            ) from error
    flat = [x.detach().contiguous() if isinstance(x, Tensor) else x for x in inputs]
    # a method does not keep its program alive
    return lambda: (program, method.execute(flat))


def lacking_kernels(plans: Sequence[Any]) -> list[str]:
    """Ops of methods that no kernel of this process computes.

    Args:
        plans: Their execution plans.
    """
    from executorch.runtime import Runtime

    known = Runtime.get().operator_registry.operator_names
    ops = [op for plan in plans for op in plan.operators]
    wanted = {f"{op.name}.{op.overload}" if op.overload else op.name for op in ops}
    return sorted(wanted - set(known))
