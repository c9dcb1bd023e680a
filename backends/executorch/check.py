"""Execute saved ExecuTorch programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from graphopt.backends.quiet import silent
from graphopt.errors import VerificationError
from graphopt.extras import require

__all__ = ["lacking_kernels", "run_program"]


def run_program(path: Path, inputs: Sequence[Any]) -> list[Tensor]:
    """Execute the program at `path` on the ExecuTorch runtime.

    Args:
        path: A .pte.
        inputs: Flat inputs, with the types and shapes that the program was lowered with.

    Returns:
        Outputs in the program's order.

    Raises:
        VerificationError: The runtime refuses the program or the inputs.
    """
    with silent() as said:
        require("executorch.runtime", "executorch")
        require("executorch.kernels.quantized", "executorch")
        from executorch.runtime import Runtime

        try:
            method = Runtime.get().load_program(str(path)).load_method("forward")
            flat = [x.detach().contiguous() if isinstance(x, Tensor) else x for x in inputs]
            outputs = method.execute(flat)
        except Exception as error:
            raise VerificationError(
                f"{path.name} does not run on the ExecuTorch runtime: {error}\n{said()}"
            ) from error
        return [output.clone() for output in outputs if isinstance(output, Tensor)]


def lacking_kernels(plan: Any) -> list[str]:
    """Ops of a plan that no kernel of this process computes."""
    from executorch.runtime import Runtime

    known = Runtime.get().operator_registry.operator_names
    wanted = {f"{op.name}.{op.overload}" if op.overload else op.name for op in plan.operators}
    return sorted(wanted - set(known))
