"""The Core ML backend: coremltools' converter and an evaluator of what was saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from torch.export import ExportedProgram
from typing_extensions import Unpack, override

from graphopt.backends.base import Artifact, Backend
from graphopt.backends.capabilities import Capabilities
from graphopt.backends.casting import op_predicate
from graphopt.backends.compute_plan import ComputePlan, on_macos
from graphopt.backends.coreml.check import evaluate_calls, evaluate_functions, runner_of
from graphopt.backends.coreml.conv_bias import FUSE_CONV_BIAS, THEIRS, register_fusion
from graphopt.backends.coreml.delegate import CoreMLDelegate
from graphopt.backends.coreml.distinct_outputs import keep_outputs_distinct
from graphopt.backends.coreml.flexible import input_types
from graphopt.backends.coreml.left_out import LEFT_OUT
from graphopt.backends.coreml.limits import Progress, explain_failure, following
from graphopt.backends.coreml.lower import (
    COMPLEX_NUMBERS,
    INTERFACE,
    LACKS,
    TABLE_TYPES,
    legal_export,
    legal_passes,
    small_constants_once,
)
from graphopt.backends.coreml.options import CoreMLOptions
from graphopt.backends.coreml.package import with_identifiers_of_content
from graphopt.backends.coreml.plan import plan_of
from graphopt.backends.coreml.precision import CLAMP, float16, register_clamp
from graphopt.backends.coreml.refusals import PACKED, refusals
from graphopt.backends.coreml.states import state_refusals
from graphopt.backends.coreml.translations import our_translations
from graphopt.backends.coreml.updates import place_updates
from graphopt.backends.delegate import Delegate
from graphopt.backends.interface import flat_call, output_names
from graphopt.backends.options import LoweringKeywords, TargetOptions, read_options
from graphopt.backends.quiet import quiet
from graphopt.backends.shapes import plan_shapes
from graphopt.backends.verification import Evaluation
from graphopt.exclusive import exclusively
from graphopt.extras import require
from graphopt.ir.program import Program
from graphopt.passes.pass_base import Pass
from graphopt.run.batches import Batch

__all__ = ["CoreMLArtifact", "CoreMLBackend"]


class CoreMLArtifact(Artifact):
    """A Core ML program; saves as .mlpackage and is evaluated from what was saved.

    Attributes:
        exported: What was converted.
        model: coremltools' model.
    """

    def __init__(
        self,
        backend: CoreMLBackend,
        program: Program,
        exported: ExportedProgram,
        model: Any,
        options: CoreMLOptions,
    ) -> None:
        super().__init__(backend, program, vars(options), options.float_type)
        self.exported = exported
        self.model = model

    @override
    @exclusively
    def _write(self, path: Path) -> None:
        with quiet("coremltools"):
            self.model.save(str(path))
        with_identifiers_of_content(path / "Manifest.json")
        # a debugging aid outside the package's manifest, as large as the program itself
        (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)

    @override
    def _plan(self, run: Callable[[], object], runs: int) -> ComputePlan:
        assert self.path is not None
        return plan_of(self.path)


class CoreMLBackend(Backend):
    """Lower through coremltools."""

    name: ClassVar[str] = "Core ML"
    capabilities: ClassVar[Capabilities] = Capabilities(
        index_bits=(1, 2, 3, 4, 6, 8),
        lut_dtypes=("float32", "float16", "int8", "uint8"),
        weight_types=("int4", "uint4", "int8", "uint8"),
        table_types=TABLE_TYPES,
        minimum=False,
        lacks=LACKS,
        complex_numbers=COMPLEX_NUMBERS,
        bfloat16_scales=False,
        activation_types=("int8", "uint8"),
        activation_channels=False,
    )
    options: ClassVar[type[TargetOptions]] = CoreMLOptions
    delegate_type: ClassVar[type[Delegate]] = CoreMLDelegate

    @override
    def unsupported(self, program: Program) -> list[str]:
        return [*refusals(program, self.capabilities), *state_refusals(program, "")]

    @override
    def held(self, lowering: Mapping[str, Any]) -> Capabilities:
        older = lowering.get("minimum_deployment_target") in ("iOS16", "iOS17")
        return PACKED if older else self.capabilities

    @override
    def legalize(self) -> tuple[Pass, ...]:
        return legal_passes()

    @override
    @exclusively
    def lower(self, program: Program, **options: Unpack[LoweringKeywords]) -> CoreMLArtifact:
        """Convert a program, with the shapes of its example or with others.

        Args:
            program: In our vocabulary.
            options: Fields of `CoreMLOptions`.

        Raises:
            LoweringError: An option is unknown, the deployment target cannot hold a table, or
                coremltools cannot convert the program.
        """
        chosen = read_options(CoreMLOptions, self.name, options)
        oldest = chosen.minimum_deployment_target
        with quiet("coremltools"):
            ct = require("coremltools", "coreml")
        plan = plan_shapes(
            program, chosen.shapes, self.name, bounded="takes ranges of sizes with both ends"
        )
        exported = legal_export(program, oldest, plan=plan)
        precision = getattr(ct.precision, chosen.precision.upper())
        pipeline = ct.PassPipeline.DEFAULT
        pipeline.remove_passes(LEFT_OUT)
        register_fusion()
        pipeline.passes = [FUSE_CONV_BIAS if name == THEIRS else name for name in pipeline.passes]
        place_updates(pipeline)
        keep_outputs_distinct(pipeline)
        if chosen.precision == "float16":
            register_clamp()
            pipeline.insert_pass(pipeline.passes.index("common::add_fp16_cast"), CLAMP)
            calls = [flat_call(call, INTERFACE) for call in chosen.calibration_data or ()]
            precision = float16(exported, op_predicate(chosen.ignored_ops), calls)
        names = output_names(program)
        progress = Progress()
        try:
            with (
                quiet("coremltools"),
                small_constants_once(),
                our_translations(),
                following(progress),
            ):
                model = ct.convert(
                    exported,
                    inputs=input_types(exported, plan),
                    outputs=None if names is None else [ct.TensorType(name=name) for name in names],
                    minimum_deployment_target=getattr(ct.target, oldest),
                    compute_precision=precision,
                    pass_pipeline=pipeline,
                    skip_model_load=True,
                )
        except Exception as error:
            raise explain_failure(exported, error, progress.name) from error
        artifact = CoreMLArtifact(self, program, exported, model, chosen)
        artifact.shapes = plan
        return artifact

    @override
    @exclusively
    def write_set(self, path: Path, methods: Mapping[str, Artifact]) -> None:
        with quiet("coremltools"):
            ct = require("coremltools", "coreml")
        with TemporaryDirectory() as folder, quiet("coremltools"):
            described = ct.utils.MultiFunctionDescriptor()
            for name, artifact in methods.items():
                alone = Path(folder) / f"{name}.mlpackage"
                artifact._write(alone)
                described.add_function(str(alone), "main", name)
            described.default_function_name = next(iter(methods))
            ct.utils.save_multifunction(described, str(path))

    @override
    @exclusively
    def evaluate_set(
        self, path: Path, programs: Mapping[str, Program], calls: Sequence[tuple[str, Batch]]
    ) -> list[Evaluation]:
        return evaluate_functions(path, programs, calls)

    @override
    def runner(self, path: Path, program: Program, call: Batch) -> Callable[[], object] | None:
        return runner_of(path, program, call) if on_macos() else None

    @override
    @exclusively
    def evaluate_sequence(
        self, path: Path, program: Program, calls: Sequence[Batch]
    ) -> list[Evaluation]:
        return evaluate_calls(path, program, calls)
