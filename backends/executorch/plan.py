"""Evaluate a .pte that delegates to a target whose delegate does not run on this host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.delegate import Payload
from graphopt.errors import VerificationError
from graphopt.extras import require

__all__ = ["PlannedProgram", "read_plan"]

_CASTS = ("aten::_to_copy", "dim_order_ops::_to_dim_order_copy", "dim_order_ops::_clone_dim_order")
_TYPES = {
    0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64,
    5: torch.float16, 6: torch.float32, 7: torch.float64, 11: torch.bool, 15: torch.bfloat16,
}  # fmt: skip
Run = Callable[[Payload, Sequence[Tensor], Path], list[Tensor]]


@dataclass(frozen=True)
class PlannedProgram:
    """The execution plan of a .pte.

    Attributes:
        plan: ExecuTorch's own description.
        payloads: What the file holds for each delegate.
        ids: Name of each delegate.
    """

    plan: Any
    payloads: tuple[Payload, ...]
    ids: tuple[str, ...]

    def run(self, inputs: Sequence[Any], runners: Mapping[str, Run], folder: Path) -> list[Tensor]:
        """Carry the plan's instructions out.

        Args:
            inputs: Flat inputs.
            runners: Delegate's name → what evaluates its payloads.
            folder: An empty folder to unpack into.

        Raises:
            VerificationError: An op outside the delegates has no rule here.
        """
        values: dict[int, Any] = dict(zip(self.plan.inputs, inputs, strict=True))
        for number, instruction in enumerate(self.plan.chains[0].instructions):
            call = instruction.instr_args
            kind = type(call).__name__
            if kind == "DelegateCall":
                unpacked = folder / str(number)
                unpacked.mkdir()
                self._delegate(call, values, runners, unpacked)
            elif kind == "KernelCall":
                self._kernel(call, values)
            elif kind != "FreeCall":
                raise VerificationError(f"the plan has a {kind}, which is not evaluated here")
        return [values[index] for index in self.plan.outputs if isinstance(values[index], Tensor)]

    def _delegate(
        self, call: Any, values: dict[int, Any], runners: Mapping[str, Run], folder: Path
    ) -> None:
        name = self.ids[call.delegate_index]
        if name not in runners:
            raise VerificationError(f"no evaluator of delegate {name!r}; there are {list(runners)}")
        given = [index for index in call.args if index in values]
        results = [index for index in call.args if index not in values]
        outputs = runners[name](
            self.payloads[call.delegate_index], [values[index] for index in given], folder
        )
        if len(outputs) != len(results):
            raise VerificationError(
                f"delegate {name!r} gave {len(outputs)} outputs for {len(results)} values"
            )
        for index, output in zip(results, outputs, strict=True):
            described = self.plan.values[index].val
            shape, dtype = list(described.sizes), _TYPES[int(described.scalar_type)]
            values[index] = output.reshape(shape).to(dtype)

    def _kernel(self, call: Any, values: dict[int, Any]) -> None:
        name = self.plan.operators[call.op_index].name
        if name not in _CASTS:
            raise VerificationError(
                f"op {name!r} is outside the delegates, and kernels run on the ExecuTorch runtime only"
            )
        result = call.args[-1]
        dtype = _TYPES[int(self.plan.values[result].val.scalar_type)]
        values[result] = values[call.args[0]].to(dtype)


def read_plan(path: Path) -> PlannedProgram:
    """Read a .pte.

    Raises:
        VerificationError: It cannot be read.
    """
    require("executorch.exir", "executorch")
    from executorch.exir._serialize._program import deserialize_pte_binary

    try:
        file = deserialize_pte_binary(path.read_bytes())
    except Exception as error:
        raise VerificationError(f"{path.name} is no ExecuTorch program: {error}") from error
    named = {}
    if file.named_data is not None:
        named = {
            key: bytes(file.named_data.buffers[entry.buffer_index])
            for key, entry in file.named_data.pte_data.items()
        }
    plan = file.program.execution_plan[0]
    payloads = tuple(
        Payload(bytes(file.program.backend_delegate_data[each.processed.index].data), named)
        for each in plan.delegates
    )
    return PlannedProgram(plan, payloads, tuple(each.id for each in plan.delegates))
