"""The ExecuTorch backend: its partitioners, and the runtime that comes with executorch."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from typing_extensions import override

from graphopt.backends import load_backend
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
from graphopt.backends.delegate import Delegate
from graphopt.backends.executorch.compress_tables import CompressTables
from graphopt.backends.executorch.convolutions_as_linear import ConvolutionsAsLinear
from graphopt.backends.executorch.legalize import (
    DuplicateDequantize,
    LegalizeForXNNPACK,
)
from graphopt.backends.executorch.partition import partition_configs
from graphopt.backends.executorch.plan import read_plan
from graphopt.backends.executorch.weight_forms import why_not_integers
from graphopt.backends.quiet import silent
from graphopt.errors import LoweringError, VerificationError
from graphopt.extras import require
from graphopt.ir.annotations import clear_notes, notes_of
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.program import Program, export_graph
from graphopt.passes import (
    DequantizeToShiftScale,
    ExpandSparse,
    ExpandTables,
    RemoveUnused,
    TablesToIntegers,
)
from graphopt.passes.pass_base import Pass
from graphopt.passes.pass_manager import run_passes

__all__ = ["Delegation", "ExecuTorchArtifact", "ExecuTorchBackend", "run_program"]

DelegateName = Literal["xnnpack", "portable", "coreml", "coreai"]
Tables = Literal["auto", "dense", "int8", "compressed"]
_DELEGATES = ("xnnpack", "portable", "coreml", "coreai")
_OTHERS = {"coreml": "CoreMLBackend", "coreai": "CoreAIBackend"}  # names in a .pte


def _as_integers(weight: fx.Node, reader: fx.Node) -> bool:
    return not why_not_integers(weight, reader)


_TABLE_PASSES: dict[str, tuple[Pass, ...]] = {
    "auto": (CompressTables(rows_only=True), TablesToIntegers(_as_integers), ExpandTables()),
    "int8": (TablesToIntegers(), ExpandTables()),
    "dense": (ExpandTables(),),
    "compressed": (CompressTables(), ConvolutionsAsLinear()),
}


@dataclass(frozen=True)
class Delegation:
    """Which ops the delegate computes and which are left to portable kernels.

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
        delegation: What the delegate took.
        lowered: The program in PyTorch, in the form that was lowered; None for other targets'
            delegates.
        planned_memory: Bytes that the runtime sets aside for values, constants not included; what a
            delegate allocates for itself is not known here.
    """

    def __init__(
        self,
        backend: ExecuTorchBackend,
        program: Program,
        buffer: bytes,
        delegation: Delegation,
        lowered: CapturedModule | None,
        planned_memory: int,
    ) -> None:
        super().__init__(backend, program)
        self.buffer = buffer
        self.delegation = delegation
        self.lowered = lowered
        self.planned_memory = planned_memory

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
    """Lower through ExecuTorch's edge dialect to a delegate, or to portable kernels alone."""

    name: ClassVar[str] = "ExecuTorch"
    capabilities: ClassVar[Capabilities] = Capabilities(
        index_bits=(),
        lut_dtypes=(),
        grouped=False,
        vector=False,
        channel_scale=False,
        weight_types=("int8", "uint8", "int2", "int3", "int4", "uint4", "int6"),
        activation_types=("int8", "uint8", "int4", "uint4"),
        activation_channels=False,
        fused_activations=frozenset({"relu", "relu6", "hardtanh", "clamp"}),
    )

    @override
    def unsupported(self, program: Program) -> list[str]:
        gm = program.graph_module
        reasons = quantization_refusals(gm, self.capabilities)
        for node in gm.graph.nodes:
            value = node.meta.get("val")
            if node.op != "call_function" or not isinstance(value, Tensor):
                continue
            name = str(node.target)
            if "dequantize_per" in name and value.dtype != torch.float32:
                kind = str(value.dtype).removeprefix("torch.")
                reasons.append(f"{node.name}: integers beside {kind}; quantize a float32 model")
            if "aten.conv" in name and value.ndim == 5:
                reasons.append(f"{node.name}: there are no kernels of 3-D convolutions")
        return reasons

    @override
    def legalize(self, tables: Tables = "auto") -> tuple[Pass, ...]:
        return (
            ExpandSparse(),
            *_TABLE_PASSES[tables],
            DequantizeToShiftScale(),
            LegalizeForXNNPACK(),
            RemoveUnused(),
            DuplicateDequantize(),
        )

    @override
    def refuse_unsupported(self, program: Program, **options: Any) -> None:
        name = options.get("delegate", "xnnpack")
        if name in _OTHERS:
            load_backend(name).refuse_unsupported(program)
        else:
            super().refuse_unsupported(program)

    @override
    def lower(
        self,
        program: Program,
        *,
        delegate: DelegateName = "xnnpack",
        tables: Tables = "auto",
        **options: Any,
    ) -> ExecuTorchArtifact:
        """Convert a program with the shapes of its example.

        Args:
            program: In our vocabulary.
            delegate: "xnnpack" and "portable" (no delegate) run on any host; "coreml" and "coreai"
                hold the whole program in the form of these targets and run on Apple's systems.
            tables: What becomes of lookup tables for "xnnpack" and "portable". "dense": the weights
                that they stand for, the fastest and largest. "int8": tables of int8 entries become
                int8 weights, exactly equal and a quarter of the size; others dense. "compressed":
                packed codes that are decoded at every call, the smallest file and the slowest.
                "auto": int8 where XNNPACK computes with it (then it is the fastest, too), codes for
                embeddings, of which only the rows that are read are decoded, dense for the rest.
            options: Those of the Core ML and Core AI backends for these delegates: `precision`,
                `minimum_deployment_target`.

        Raises:
            LoweringError: An option is wrong, or ExecuTorch cannot convert the program.
        """
        if delegate not in _DELEGATES:
            raise LoweringError(f"delegate must be one of {_DELEGATES}, got {delegate!r}")
        if not isinstance(tables, str) or tables not in _TABLE_PASSES:
            raise LoweringError(f"tables must be one of {list(_TABLE_PASSES)}, got {tables!r}")
        # the runtime reads inputs in the order of their axes
        program = program.with_example(
            *pytree.tree_map_only(
                Tensor, Tensor.contiguous, (program.example_args, program.example_kwargs)
            )
        )
        if delegate in _OTHERS:
            if tables != "auto":
                raise LoweringError(
                    f"tables={tables!r} is for xnnpack and portable, not {delegate}"
                )
            return self._through(program, delegate, options)
        if options:
            raise LoweringError(
                f"ExecuTorch has no option {sorted(options)} for {delegate}; there are 'delegate',"
                " 'tables'"
            )
        legal = program.copy()
        gm = legal.graph_module
        clear_notes(gm)
        run_passes(gm, [RemoveUnused(), *self.legalize(tables)])
        _own_storage(gm)
        exported = export_graph(gm, program.example_args, program.example_kwargs)

        def partitioners() -> list[Any]:
            if delegate == "portable":
                return []
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
                XnnpackPartitioner,
            )

            return [XnnpackPartitioner(configs=list(partition_configs()))]

        return self._emit(program, delegate, exported, partitioners, gm)

    def _through(self, program: Program, name: str, options: dict[str, Any]) -> ExecuTorchArtifact:
        """Lower to another target's delegate."""
        backend = load_backend(name)
        backend.refuse_unsupported(program)
        try:
            target = backend.delegate(**options)
        except TypeError as error:
            raise LoweringError(f"delegate {name!r}: {error}") from None
        return self._emit(
            program, name, target.export(program), lambda: [target.partitioner()], None, target
        )

    def _emit(
        self,
        program: Program,
        name: str,
        exported: ExportedProgram,
        partitioners: Callable[[], list[Any]],
        lowered: CapturedModule | None,
        target: Delegate | None = None,
    ) -> ExecuTorchArtifact:
        with silent() as said:
            require("executorch.exir", "executorch")
            require("executorch.kernels.quantized", "executorch")
            from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

            chosen = partitioners()
            options: dict[str, Any] = {
                "compile_config": EdgeCompileConfig(_check_ir_validity=False)
            }
            if target is not None:
                options |= target.edge_options()
            try:
                edge = to_edge_transform_and_lower(exported, partitioner=chosen, **options)
                if target is not None:
                    target.finish(edge)
                notes = () if lowered is None else notes_of(lowered)
                delegation = _delegation(edge, notes)
                manager = edge.to_executorch()
                buffer = bytes(manager.buffer)
                plan = manager.executorch_program.execution_plan[0]
            except Exception as error:
                raise LoweringError(
                    f"ExecuTorch cannot convert the program for {name}: {error}\n{said()}"
                ) from error
            lacking = _lacking(plan) if target is None else []
        if lacking:
            raise LoweringError(f"the ExecuTorch runtime has no kernel for {', '.join(lacking)}")
        memory = sum(int(size) for size in plan.non_const_buffer_sizes)
        return ExecuTorchArtifact(self, program, buffer, delegation, lowered, memory)

    @override
    def check(
        self, path: Path, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Verification:
        inputs = pytree.tree_leaves((args, kwargs))
        planned = read_plan(path)
        others = [name for name, key in _OTHERS.items() if key in planned.ids]
        if others:
            runners = {_OTHERS[name]: load_backend(name).delegate().run for name in others}
            with TemporaryDirectory() as folder:
                found = planned.run(inputs, runners, Path(folder))
            how = f"unpacked the saved program and evaluated its {' and '.join(others)} part"
        else:
            found = run_program(path, inputs)
            how = "ran the saved program on the ExecuTorch runtime"
        errors = compare_outputs(found, expected_outputs(program, args, kwargs))
        weights = stored_weights(program.graph_module)
        return Verification(max(errors, default=0.0), errors, how, weights=weights)


def _lacking(plan: Any) -> list[str]:
    """Ops of a plan that no kernel of this process computes."""
    from executorch.runtime import Runtime

    known = Runtime.get().operator_registry.operator_names
    wanted = {f"{op.name}.{op.overload}" if op.overload else op.name for op in plan.operators}
    return sorted(wanted - set(known))


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
