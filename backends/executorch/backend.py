"""The ExecuTorch backend: its partitioners, and the runtime that comes with executorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from typing_extensions import Unpack, override

from graphopt.backends import load_backend
from graphopt.backends.base import Artifact, Backend, stored_weights
from graphopt.backends.capabilities import Capabilities
from graphopt.backends.data_sizes import refuse_data_sizes
from graphopt.backends.delegate import Delegate
from graphopt.backends.executorch.check import (
    lacking_kernels,
    run_calls,
    run_methods,
    run_program,
    runner_of,
)
from graphopt.backends.executorch.delegation import Delegation, delegation_of
from graphopt.backends.executorch.integer_kernels import PACKED, with_float_results
from graphopt.backends.executorch.kernels import FLOAT_OPS, FUSED_ACTIVATIONS
from graphopt.backends.executorch.legalize import DuplicateDequantize
from graphopt.backends.executorch.lower import COMPLEX_NUMBERS, legal_export, legal_passes
from graphopt.backends.executorch.options import (
    ExecuTorchOptions,
    Tables,
    delegates_of_targets,
)
from graphopt.backends.executorch.partitioner import xnnpack_partitioner
from graphopt.backends.executorch.plan import read_plan
from graphopt.backends.executorch.refusals import refusals
from graphopt.backends.executorch.sizes import stored_bits
from graphopt.backends.executorch.state import executorch_config, set_buffer
from graphopt.backends.interface import named_inputs
from graphopt.backends.options import LoweringKeywords, TargetOptions
from graphopt.backends.quiet import silent
from graphopt.backends.sets import SetArtifact, own_options
from graphopt.backends.shapes import plan_shapes
from graphopt.backends.verification import Evaluation
from graphopt.errors import LoweringError, VerificationError
from graphopt.exclusive import exclusively
from graphopt.extras import require
from graphopt.ir.annotations import notes_of
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.program import Program
from graphopt.ir.program_set import ProgramSet
from graphopt.ir.quick_graphs import quick_graphs
from graphopt.ir.state import state_of
from graphopt.passes.pass_base import Pass
from graphopt.run.batches import Batch
from graphopt.schemes.sizes import Parts
from graphopt.specs.storage import StorageRules

__all__ = ["Delegation", "ExecuTorchArtifact", "ExecuTorchBackend", "run_program"]

# kernels, and XNNPACK in float16, add up the terms of these in 16 bits where they are given in 16 bits
_OWN_PARTITIONER = (
    "ExecuTorch's own XnnpackPartitioner loses the scales of linear layers whose results stay in float"
    ' ({}); give backend="executorch" to prepare or compress, which then rounds them, or lower with'
    " graphopt.lower"
)
_NARROW_SUMS = (
    *("linear", "matmul", "addmm", "baddbmm", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention"),
)


@dataclass(frozen=True)
class _Form:
    """A program in the form that a delegate takes: another target's, or ours with its graph."""

    name: str
    exported: ExportedProgram
    lowered: CapturedModule | None = None
    target: Delegate | None = None


@dataclass(frozen=True)
class _Emitted:
    """What ExecuTorch's conversion gave."""

    buffer: bytes
    delegation: Delegation
    planned_memory: int


class ExecuTorchArtifact(Artifact):
    """An ExecuTorch program; saves as .pte and runs on the ExecuTorch runtime.

    An entry point of a set is converted alone only where it is asked for, since the set is converted
    as a whole.

    Attributes:
        lowered: The program in PyTorch, in the form that was lowered; None for other targets'
            delegates.
        exported: What is converted.
    """

    def __init__(self, backend: ExecuTorchBackend, program: Program, form: _Form) -> None:
        super().__init__(backend, program)
        self._form = form
        self.lowered, self.exported = form.lowered, form.exported

    @cached_property
    def emitted(self) -> _Emitted:
        """The conversion's outcome.

        Raises:
            LoweringError: ExecuTorch cannot convert the program.
        """
        return _emit(self._form)

    @property
    def buffer(self) -> bytes:
        """The program's bytes."""
        return self.emitted.buffer

    @property
    def delegation(self) -> Delegation:
        """What the delegate took."""
        return self.emitted.delegation

    @property
    def planned_memory(self) -> int:
        """Bytes that the runtime sets aside for values, constants not included.

        What a delegate allocates for itself is not known here.
        """
        return self.emitted.planned_memory

    @override
    @exclusively
    def _write(self, path: Path) -> None:
        path.write_bytes(self.buffer)


class ExecuTorchBackend(Backend):
    """Lower through ExecuTorch's edge dialect to a delegate, or to portable kernels alone."""

    name: ClassVar[str] = "ExecuTorch"
    capabilities: ClassVar[Capabilities] = Capabilities(
        index_bits=(),
        lut_dtypes=(),
        grouped=False,
        vector=False,
        channel_scale=False,
        weight_types=tuple(sorted(PACKED)),
        activation_types=("int8", "uint8", "int4", "uint4"),
        activation_channels=False,
        fused_activations=FUSED_ACTIVATIONS,
        # XNNPACK's rules for linear layers and convolutions look for a quantize op behind them
        integer_results=True,
        float_ops=FLOAT_OPS,
        complex_numbers=COMPLEX_NUMBERS,
    )
    options: ClassVar[type[TargetOptions]] = ExecuTorchOptions

    @override
    def unsupported(self, program: Program) -> list[str]:
        return refusals(program, self.capabilities)

    @override
    def legalize(self, tables: Tables = "auto") -> tuple[Pass, ...]:
        return legal_passes(tables)

    @override
    def remarks_on(self, gm: fx.GraphModule) -> list[str]:
        names = ", ".join(with_float_results(gm))
        return [_OWN_PARTITIONER.format(names)] if names else []

    @override
    def refuse_unsupported(self, program: Program, **options: Unpack[LoweringKeywords]) -> None:
        name = options.get("delegate", "xnnpack")
        if name in list(delegates_of_targets()):
            load_backend(name).refuse_unsupported(program)
        else:
            super().refuse_unsupported(program)

    @override
    def options_among(self, given: Mapping[str, Any]) -> dict[str, Any]:
        mine = super().options_among(given)
        if mine.get("delegate") in delegates_of_targets():
            mine |= load_backend(mine["delegate"]).options_among(given)
        return mine

    @override
    def storage(self, options: Mapping[str, Any], floats: torch.dtype) -> StorageRules:
        own, others = _split(options)
        if own.delegate in delegates_of_targets():
            return load_backend(own.delegate).storage(others, floats)
        _refuse_options(others, own.delegate)
        return replace(self.capabilities.storage, float_dtype=floats)

    @override
    def stored_bits(
        self,
        parts: Parts,
        rules: StorageRules,
        options: Mapping[str, Any],
        reader: fx.Node | None = None,
        *,
        rounded: bool = False,
    ) -> int:
        own, others = _split(options)
        if own.delegate in delegates_of_targets():
            backend = load_backend(own.delegate)
            return backend.stored_bits(parts, rules, others, reader, rounded=rounded)
        return stored_bits(parts, rules, own.tables, reader, rounded=rounded)

    @override
    @exclusively
    def lower(self, program: Program, **options: Unpack[LoweringKeywords]) -> ExecuTorchArtifact:
        """Convert a program, with the shapes of its example or with bounded ones.

        Args:
            program: In our vocabulary.
            options: Fields of `ExecuTorchOptions`; for another target's delegate also that target's.

        Raises:
            LoweringError: An option is wrong, or ExecuTorch cannot convert the program.
        """
        artifact = self._formed(program, **options)
        _ = artifact.emitted
        return artifact

    @override
    @exclusively
    def lower_set(self, programs: ProgramSet, **options: Unpack[LoweringKeywords]) -> SetArtifact:
        methods = {
            name: self._formed(each, **own_options(name, programs, options))
            for name, each in programs.methods.items()
        }
        return SetArtifact(self, programs, methods)

    def _formed(self, program: Program, **options: Any) -> ExecuTorchArtifact:
        given = dict(options)
        chosen, others = _split(given)
        plan = plan_shapes(
            program, chosen.shapes, self.name, bounded="plans memory for the largest sizes"
        )
        if chosen.delegate in delegates_of_targets():
            backend = load_backend(chosen.delegate)
            if plan.is_open:
                raise LoweringError(
                    f"delegate {chosen.delegate!r} takes the example's sizes alone; lower to"
                    f" {chosen.delegate!r} itself, or to delegate='xnnpack', for open ones"
                )
            backend.refuse_unsupported(program)
            try:
                target = backend.delegate(**others)
            except LoweringError as error:
                raise LoweringError(f"delegate {chosen.delegate!r}: {error}") from None
            form = _Form(chosen.delegate, target.export(program), target=target)
            artifact = ExecuTorchArtifact(self, program, form)
            artifact.options, artifact.precision = given, target.options.float_type
            return artifact
        _refuse_options(others, chosen.delegate)
        exported, gm = legal_export(program, chosen.tables, chosen.delegate, plan)
        artifact = ExecuTorchArtifact(self, program, _Form(chosen.delegate, exported, gm))
        artifact.options, artifact.shapes = given, plan
        return artifact

    @override
    @exclusively
    def write_set(self, path: Path, methods: Mapping[str, Artifact]) -> None:
        path.write_bytes(set_buffer(methods, _partitioners))

    @override
    @exclusively
    def evaluate_set(
        self, path: Path, programs: Mapping[str, Program], calls: Sequence[tuple[str, Batch]]
    ) -> list[Evaluation]:
        flat = [(name, pytree.tree_leaves(call)) for name, call in calls]
        how = "ran the methods of the saved program on the ExecuTorch runtime"
        weights = {name: stored_weights(each.graph_module) for name, each in programs.items()}
        return [
            Evaluation(tuple(outputs), how, weights=weights[name], narrow_sums=_NARROW_SUMS)
            for (name, _), outputs in zip(flat, run_methods(path, flat), strict=True)
        ]

    @override
    def runner(self, path: Path, program: Program, call: Batch) -> Callable[[], object] | None:
        planned = read_plan(path)
        if any(kind.id in planned.ids for kind in delegates_of_targets().values()):
            return None
        return runner_of(path, pytree.tree_leaves(call))

    @override
    @exclusively
    def evaluate_sequence(
        self, path: Path, program: Program, calls: Sequence[Batch]
    ) -> list[Evaluation]:
        planned = read_plan(path)
        others = {
            name: kind.id for name, kind in delegates_of_targets().items() if kind.id in planned.ids
        }
        if not others:
            results = run_calls(path, [pytree.tree_leaves(call) for call in calls])
            how = "ran the saved program on the ExecuTorch runtime"
        elif len(calls) > 1 and state_of(program.graph_module):
            raise VerificationError(
                f"{self.name}: the {' and '.join(others)} part of the program is evaluated here from"
                " its file, where no state is kept over several calls"
            )
        else:
            runners = {key: load_backend(name).delegate().run for name, key in others.items()}
            results = []
            for call in calls:
                with TemporaryDirectory() as folder:
                    inputs = list(named_inputs(program, *call).values())
                    results.append(planned.run(inputs, runners, Path(folder)))
            how = f"unpacked the saved program and evaluated its {' and '.join(others)} part"
        weights = stored_weights(program.graph_module)
        return [
            Evaluation(tuple(outputs), how, weights=weights, narrow_sums=_NARROW_SUMS)
            for outputs in results
        ]


def _emit(form: _Form) -> _Emitted:
    target = form.target
    with silent() as said, quick_graphs():
        require("executorch.exir", "executorch")
        require("executorch.kernels.quantized", "executorch")
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        chosen = _partitioners(form.name) if target is None else [target.partitioner()]
        options: dict[str, Any] = {
            "compile_config": EdgeCompileConfig(_check_ir_validity=False),
            # behind ExecuTorch's decompositions, which may have made several readers of one
            "transform_passes": [DuplicateDequantize()],
        }
        if target is not None:
            options |= target.edge_options()
        try:
            edge = to_edge_transform_and_lower(form.exported, partitioner=chosen, **options)
            if target is not None:
                target.finish(edge)
            notes = () if form.lowered is None else notes_of(form.lowered)
            delegation = delegation_of(edge, notes)
            manager = edge.to_executorch(executorch_config(form.exported))
            buffer = bytes(manager.buffer)
            plan = manager.executorch_program.execution_plan[0]
        except Exception as error:
            # sizes with an upper bound are taken
            refuse_data_sizes(form.exported, ExecuTorchBackend.name)
            raise LoweringError(
                f"ExecuTorch cannot convert the program for {form.name}: {error}\n{said()}"
            ) from error
        lacking = lacking_kernels([plan]) if target is None else []
    if lacking:
        raise LoweringError(f"the ExecuTorch runtime has no kernel for {', '.join(lacking)}")
    memory = sum(int(size) for size in plan.non_const_buffer_sizes)
    return _Emitted(buffer, delegation, memory)


def _split(options: Mapping[str, Any]) -> tuple[ExecuTorchOptions, dict[str, Any]]:
    """ExecuTorch's own options, and those of another target as its delegate."""
    others = dict(options)
    mine = ("delegate", "tables", "shapes")
    own = {name: others.pop(name) for name in mine if name in others}
    return ExecuTorchOptions(**own), others


def _refuse_options(others: Mapping[str, Any], delegate: str) -> None:
    if others:
        raise LoweringError(
            f"ExecuTorch has no option {sorted(others)} for {delegate}; there are"
            " 'delegate', 'shapes', 'tables'"
        )


def _partitioners(delegate: str) -> list[Any]:
    return [] if delegate == "portable" else [xnnpack_partitioner()]
