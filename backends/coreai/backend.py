"""The Core AI backend: coreai-torch's converter and the runtime that comes with coreai-core."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from typing_extensions import Unpack, override

from graphopt.backends.base import Artifact, Backend, stored_weights
from graphopt.backends.capabilities import Capabilities
from graphopt.backends.compute_plan import ComputePlan, on_macos
from graphopt.backends.coreai.asset import without_date
from graphopt.backends.coreai.check import Running, run_asset, run_calls
from graphopt.backends.coreai.delegate import CoreAIDelegate
from graphopt.backends.coreai.limits import explain_failure, refuse_impossible
from graphopt.backends.coreai.lower import (
    COMPLEX_NUMBERS,
    LACKS,
    TABLE_TYPES,
    legal_export,
    legal_passes,
)
from graphopt.backends.coreai.options import CoreAIOptions
from graphopt.backends.coreai.packed import packed_codes_taken
from graphopt.backends.coreai.plan import plan_of
from graphopt.backends.coreai.raise_ import RaiseFromCoreAI
from graphopt.backends.coreai.refusals import refusals
from graphopt.backends.coreai.state import initial_state, state_names
from graphopt.backends.delegate import Delegate
from graphopt.backends.interface import named_inputs, output_names
from graphopt.backends.options import LoweringKeywords, TargetOptions, read_options
from graphopt.backends.quiet import quiet
from graphopt.backends.shapes import plan_shapes
from graphopt.backends.verification import Evaluation
from graphopt.errors import LoweringError
from graphopt.exclusive import exclusively
from graphopt.extras import require
from graphopt.files import reserved
from graphopt.ir.program import Program
from graphopt.passes.pass_base import Pass
from graphopt.run.batches import Batch

__all__ = ["CoreAIArtifact", "CoreAIBackend", "run_asset"]

# the runtime adds up the terms of these in float16, one behind the other
_NARROW_SUMS = ("linear", "matmul", "addmm", "baddbmm", "scaled_dot_product_attention")


class CoreAIArtifact(Artifact):
    """A Core AI program; saves as .aimodel and runs on the Core AI runtime.

    Attributes:
        exported: What was converted, in `coreai::` ops.
        ai_program: The converted program.
    """

    def __init__(
        self,
        backend: CoreAIBackend,
        program: Program,
        exported: ExportedProgram,
        ai_program: Any,
        options: CoreAIOptions,
    ) -> None:
        super().__init__(backend, program, vars(options), options.float_type)
        self.exported = exported
        self.ai_program = ai_program

    @override
    @exclusively
    def _write(self, path: Path) -> None:
        # its writer ends the process where the disk is full
        reserved(path, self.most_bytes())
        self.ai_program.save_asset(path)
        without_date(path / "metadata.json")

    @override
    def _plan(self, run: Callable[[], object], runs: int) -> ComputePlan:
        assert isinstance(run, Running)
        return plan_of(self.ai_program, None if self.program.state else run.feeds, runs)

    def most_bytes(self) -> int:
        """No less than what the asset takes."""
        tensors = [*self.exported.state_dict.values(), *self.exported.constants.values()]
        stored = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
        return stored + stored // 32 + (1 << 20) + 4096 * len(self.exported.graph.nodes)


class CoreAIBackend(Backend):
    """Lower through coreai-torch."""

    name: ClassVar[str] = "Core AI"
    capabilities: ClassVar[Capabilities] = Capabilities(
        index_bits=(1, 2, 4, 6, 8),
        padded_bits=((3, 4),),
        lut_dtypes=("float32", "float16", "int8", "uint8", "fp8_e4m3", "fp8_e5m2"),
        weight_types=("int2", "int4", "uint4", "int8", "uint8", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1"),
        table_types=TABLE_TYPES,
        power_scales="floats",
        lacks=LACKS,
        complex_numbers=COMPLEX_NUMBERS,
        activation_types=("int8", "uint8", "fp8_e4m3", "fp8_e5m2"),
    )
    options: ClassVar[type[TargetOptions]] = CoreAIOptions
    delegate_type: ClassVar[type[Delegate]] = CoreAIDelegate

    @override
    def unsupported(self, program: Program) -> list[str]:
        return refusals(program, self.capabilities)

    @override
    def legalize(self) -> tuple[Pass, ...]:
        return legal_passes()

    @override
    def raise_(self) -> tuple[Pass, ...]:
        return (RaiseFromCoreAI(),)

    @override
    @exclusively
    def lower(self, program: Program, **options: Unpack[LoweringKeywords]) -> CoreAIArtifact:
        """Convert a program, with the shapes of its example or with open ones.

        Args:
            program: In our vocabulary.
            options: Fields of `CoreAIOptions`.

        Raises:
            LoweringError: An option is unknown, or coreai-torch cannot convert the program.
        """
        chosen = read_options(CoreAIOptions, self.name, options)
        with quiet("coreai_torch"):
            coreai_torch = require("coreai_torch", "coreai")
        with torch.no_grad():
            plan = plan_shapes(program, chosen.shapes, self.name)
            exported = legal_export(program, chosen, plan)
            refuse_impossible(exported)
            try:
                with quiet("coreai_torch"), packed_codes_taken():
                    converter = coreai_torch.TorchConverter().add_exported_program(
                        exported,
                        output_names=output_names(program),
                        state_names=state_names(exported),
                    )
                    ai_program = converter.to_coreai()
            except Exception as error:
                raise explain_failure(exported, error) from error
        artifact = CoreAIArtifact(self, program, exported, ai_program, chosen)
        artifact.shapes = plan
        return artifact

    @override
    @exclusively
    def write_set(self, path: Path, methods: Mapping[str, Artifact]) -> None:
        coreai_torch = require("coreai_torch", "coreai")
        own = {name: each for name, each in methods.items() if isinstance(each, CoreAIArtifact)}
        # its writer ends the process where the disk is full
        reserved(path, sum(artifact.most_bytes() for artifact in own.values()))
        try:
            with quiet("coreai_torch"), packed_codes_taken(), torch.no_grad():
                converter = coreai_torch.TorchConverter()
                for name, artifact in own.items():
                    converter.add_exported_program(
                        artifact.exported,
                        output_names=output_names(artifact.program),
                        state_names=state_names(artifact.exported),
                        entrypoint_name=name,
                    )
                converter.to_coreai().save_asset(path)
        except Exception as error:
            raise LoweringError(f"coreai-torch cannot convert {list(methods)}: {error}") from error

    @override
    @exclusively
    def evaluate_set(
        self, path: Path, programs: Mapping[str, Program], calls: Sequence[tuple[str, Batch]]
    ) -> list[Evaluation]:
        inputs = [named_inputs(programs[name], *call) for name, call in calls]
        state: dict[str, Tensor] = {}
        for program in programs.values():
            state = initial_state(program) | state
        steps = run_calls(path, inputs, state, [name for name, _ in calls])
        how = "ran the functions of the saved asset on the Core AI runtime"
        return [
            Evaluation(
                tuple(outputs),
                how,
                weights=stored_weights(programs[name].graph_module),
                narrow_sums=_NARROW_SUMS,
            )
            for (name, _), (outputs, _) in zip(calls, steps, strict=True)
        ]

    @override
    def runner(self, path: Path, program: Program, call: Batch) -> Callable[[], object] | None:
        # elsewhere the runtime has no kernels made for the machine, whose times would say nothing
        if not on_macos():
            return None
        return Running(path, named_inputs(program, *call), initial_state(program))

    @override
    @exclusively
    def evaluate_sequence(
        self, path: Path, program: Program, calls: Sequence[Batch]
    ) -> list[Evaluation]:
        inputs = [named_inputs(program, *call) for call in calls]
        state = initial_state(program)
        how = "ran the saved asset on the Core AI runtime"
        return [
            Evaluation(
                tuple(outputs),
                how,
                weights=stored_weights(program.graph_module),
                narrow_sums=_NARROW_SUMS,
                state=tuple(kept),
            )
            for outputs, kept in run_calls(path, inputs, state)
        ]
