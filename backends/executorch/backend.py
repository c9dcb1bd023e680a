"""The ExecuTorch backend: XNNPACK's partitioner, and the runtime that comes with executorch."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from graphopt.backends.base import (
    Artifact,
    Backend,
    Capabilities,
    Verification,
    compare_outputs,
    expected_outputs,
    quantization_refusals,
    stored_weights,
)
from graphopt.backends.executorch.legalize import DuplicateDequantize, LegalizeForXNNPACK
from graphopt.backends.executorch.partition import partition_configs
from graphopt.backends.quiet import silent
from graphopt.captured_module import CapturedModule
from graphopt.errors import LoweringError, VerificationError
from graphopt.extras import require
from graphopt.pass_base import Pass
from graphopt.pass_manager import run_passes
from graphopt.passes import DequantizeToShiftScale, ExpandTables, RemoveUnused
from graphopt.program import Program, export_graph

__all__ = ["Delegation", "ExecuTorchArtifact", "ExecuTorchBackend", "run_program"]


@dataclass(frozen=True)
class Delegation:
    """Which ops XNNPACK computes and which are left to portable kernels.

    Attributes:
        delegates: Number of delegates.
        inside: Op → how often it is in a delegate.
        outside: Op → how often it is in none.
        notes: Weights that are not stored as asked, and why.
    """

    delegates: int
    inside: dict[str, int]
    outside: dict[str, int]
    notes: tuple[str, ...] = ()


class ExecuTorchArtifact(Artifact):
    """An ExecuTorch program; saves as .pte and runs on the ExecuTorch runtime.

    Attributes:
        buffer: The program's bytes.
        delegation: What XNNPACK took.
        lowered: The program in PyTorch, in the form that was lowered.
    """

    suffix: ClassVar[str] = ".pte"

    def __init__(
        self,
        backend: ExecuTorchBackend,
        program: Program,
        buffer: bytes,
        delegation: Delegation,
        lowered: CapturedModule,
    ) -> None:
        super().__init__(backend, program)
        self.buffer = buffer
        self.delegation = delegation
        self.lowered = lowered

    @override
    def _write(self, path: Path) -> None:
        path.write_bytes(self.buffer)


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
        return [each.clone() for each in outputs if isinstance(each, Tensor)]


class ExecuTorchBackend(Backend):
    """Lower through ExecuTorch's edge dialect to XNNPACK."""

    name: ClassVar[str] = "ExecuTorch"
    capabilities: ClassVar[Capabilities] = Capabilities(
        index_bits=(), lut_dtypes=(), grouped=False, vector=False, channel_scale=False,
        weight_types=("int8", "uint8", "int2", "int3", "int4", "uint4", "int6"),
        activation_types=("int8", "uint8", "int4", "uint4"), activation_channels=False,
        fused_activations=frozenset({"relu", "relu6", "hardtanh", "clamp"}),
    )  # fmt: skip

    @override
    def unsupported(self, program: Program) -> list[str]:
        return quantization_refusals(program.graph_module, self.capabilities)

    @override
    def legalize(self) -> tuple[Pass, ...]:
        return (
            ExpandTables(),
            DequantizeToShiftScale(),
            LegalizeForXNNPACK(),
            RemoveUnused(),
            DuplicateDequantize(),
        )

    @override
    def lower(self, program: Program, **options: Any) -> ExecuTorchArtifact:
        """Convert a program with the shapes of its example.

        Args:
            program: In our vocabulary.
            options: None are known.

        Raises:
            LoweringError: An option is given, or ExecuTorch cannot convert the program.
        """
        if options:
            raise LoweringError(f"ExecuTorch has no option {sorted(options)}")
        legal = program.copy()
        gm = legal.graph_module
        gm.meta["graphopt.notes"] = ()
        run_passes(gm, [RemoveUnused(), *self.legalize()])
        _own_storage(gm)
        exported = export_graph(gm, program.example_args, program.example_kwargs)
        with silent() as said:
            require("executorch.exir", "executorch")
            require("executorch.kernels.quantized", "executorch")
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
                XnnpackPartitioner,
            )
            from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

            try:
                edge = to_edge_transform_and_lower(
                    exported,
                    partitioner=[XnnpackPartitioner(configs=list(partition_configs()))],
                    compile_config=EdgeCompileConfig(_check_ir_validity=False),
                )
                delegation = _delegation(edge, gm.meta["graphopt.notes"])
                buffer = bytes(edge.to_executorch().buffer)
            except Exception as error:
                raise LoweringError(
                    f"ExecuTorch cannot convert the program: {error}\n{said()}"
                ) from error
        return ExecuTorchArtifact(self, program, buffer, delegation, gm)

    @override
    def check(
        self, path: Path, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Verification:
        found = run_program(path, pytree.tree_leaves((args, kwargs)))
        errors = compare_outputs(found, expected_outputs(program, args, kwargs))
        how = "ran the saved program on the ExecuTorch runtime"
        weights = stored_weights(program.graph_module)
        return Verification(max(errors, default=0.0), errors, how, weights=weights)


def _own_storage(gm: CapturedModule) -> None:
    """Copies of tensors that are views: XNNPACK writes the whole storage behind a constant."""
    for holder in gm.modules():
        for held in (holder._parameters, holder._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                size = tensor.numel() * tensor.element_size()
                if tensor.untyped_storage().nbytes() == size and tensor.is_contiguous():
                    continue
                whole = tensor.detach().clone(memory_format=torch.contiguous_format)
                held[name] = nn.Parameter(whole) if isinstance(tensor, nn.Parameter) else whole  # type: ignore[assignment]


def _delegation(edge: Any, notes: tuple[str, ...]) -> Delegation:
    gm = edge.exported_program().graph_module
    inside: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    delegates = 0
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            held: Any = getattr(gm, str(node.target), None)
            if type(held).__name__ != "LoweredBackendModule":
                continue
            delegates += 1
            for each in held.original_module.graph.nodes:
                if each.op == "call_function" and each.target is not operator.getitem:
                    inside[_op_name(each)] += 1
        elif (
            node.op == "call_function"
            and node.target is not operator.getitem
            and "executorch_call_delegate" not in str(node.target)
        ):
            outside[_op_name(node)] += 1
    return Delegation(delegates, dict(inside), dict(outside), notes)


def _op_name(node: Any) -> str:
    return str(getattr(node.target, "__name__", node.target))
