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
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}
Run = Callable[[Payload, Sequence[Tensor], Path], list[Tensor]]


@dataclass(frozen=True)
class PlannedProgram:
    """The execution plan of a .pte.

    Attributes:
        plan: ExecuTorch's own description.
        payloads: What the file holds for each delegate.
        ids: Name of each delegate.
        constants: Buffers of constant tensors.
    """

    plan: Any
    payloads: tuple[Payload, ...]
    ids: tuple[str, ...]
    constants: tuple[Any, ...] = ()

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
        known = [index in values or self._is_constant(index) for index in call.args]
        given = [index for index, held in zip(call.args, known, strict=True) if held]
        results = [index for index, held in zip(call.args, known, strict=True) if not held]
        outputs = runners[name](
            self.payloads[call.delegate_index],
            [self._value(index, values) for index in given],
            folder,
        )
        if len(outputs) != len(results):
            raise VerificationError(
                f"delegate {name!r} gave {len(outputs)} outputs for {len(results)} values"
            )
        for index, output in zip(results, outputs, strict=True):
            declared = self._empty(index)
            values[index] = output.reshape(declared.shape).to(declared.dtype)

    def _is_constant(self, index: int) -> bool:
        value = self.plan.values[index].val
        return type(value).__name__ == "Tensor" and value.data_buffer_idx > 0

    def _kernel(self, call: Any, values: dict[int, Any]) -> None:
        """Run torch's own op of that name in place of the runtime's kernel."""
        described = self.plan.operators[call.op_index]
        name = described.name
        if name in _CASTS:
            result = call.args[-1]
            values[result] = self._value(call.args[0], values).to(self._empty(result).dtype)
            return
        namespace, _, op = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), op.removesuffix("_copy"), None)
        overloads = getattr(getattr(torch.ops, namespace), op, packet)
        variant = getattr(overloads, described.overload or "default", None)
        if variant is None:
            raise VerificationError(
                f"op {name}.{described.overload} is outside the delegates, and torch has none like it"
            )
        given: list[Any] = []
        outputs: dict[str, Tensor] = {}
        for argument, index in zip(variant._schema.arguments, call.args, strict=False):
            if argument.is_out:
                outputs[argument.name] = values[index] = self._empty(index)
            else:
                given.append(self._value(index, values))
        positional = [a for a in variant._schema.arguments if not a.is_out]
        plain = [v for a, v in zip(positional, given, strict=False) if not a.kwarg_only]
        named = {a.name: v for a, v in zip(positional, given, strict=False) if a.kwarg_only}
        try:
            variant(*plain, **named, **outputs)
        except Exception as error:
            raise VerificationError(
                f"op {name}.{described.overload} is outside the delegates, and torch cannot run it on"
                f" the values of the file: {error}"
            ) from error

    def _empty(self, index: int) -> Tensor:
        described = self.plan.values[index].val
        shape = [int(size) for size in described.sizes]
        return torch.empty(shape, dtype=_TYPES[int(described.scalar_type)])

    def _value(self, index: int, values: dict[int, Any]) -> Any:
        """A value: computed before, or a tensor, number, text, list or None of the file."""
        if index in values:
            return values[index]
        value = self.plan.values[index].val
        kind = type(value).__name__
        if kind == "Null":
            return None
        for field in ("int_val", "double_val", "bool_val", "string_val"):
            if hasattr(value, field):
                return getattr(value, field)
        if hasattr(value, "items"):
            items = list(value.items)
            if kind in ("IntList", "TensorList", "OptionalTensorList"):
                return [None if item < 0 else self._value(item, values) for item in items]
            return items
        if self._is_constant(index):
            empty = self._empty(index)
            if empty.numel():
                raw = bytearray(self.constants[value.data_buffer_idx].storage)
                size = empty.numel() * empty.element_size()
                empty = torch.frombuffer(raw[:size], dtype=empty.dtype).reshape(empty.shape)
            values[index] = empty
            return empty
        raise VerificationError(f"a {kind} in the plan is not evaluated here")


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
        Payload(bytes(file.program.backend_delegate_data[delegate.processed.index].data), named)
        for delegate in plan.delegates
    )
    ids = tuple(delegate.id for delegate in plan.delegates)
    return PlannedProgram(plan, payloads, ids, tuple(file.program.constant_buffer))
