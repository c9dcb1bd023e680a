"""The Core ML backend: coremltools' converter and an evaluator of what was saved."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from typing_extensions import override

from graphopt.analysis.quantized import find_quantized_activations, quantized_ops
from graphopt.analysis.stored_values import Lookup, find_lookups, find_sparse
from graphopt.backends.base import (
    Artifact,
    Backend,
    Capabilities,
    Verification,
    check_precision,
    compare_outputs,
    expected_outputs,
    match_inputs,
    named_inputs,
    quantization_refusals,
)
from graphopt.backends.coreml.decompose import decompose_for_coreml
from graphopt.backends.coreml.evaluate import evaluate, load_program
from graphopt.backends.coreml.lowerings import register_lowerings
from graphopt.backends.delegate import Delegate
from graphopt.backends.quiet import quiet
from graphopt.errors import LoweringError, VerificationError
from graphopt.extras import require
from graphopt.ir.program import Program, export_graph
from graphopt.passes import DequantizeToShiftScale, IntegersToTables, RemoveUnused
from graphopt.passes.pass_base import Pass
from graphopt.passes.pass_manager import run_passes

__all__ = ["CoreMLArtifact", "CoreMLBackend"]

_TARGETS = ("iOS16", "iOS17", "iOS18", "iOS26")
Target = Literal["iOS16", "iOS17", "iOS18", "iOS26"]


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
    ) -> None:
        super().__init__(backend, program)
        self.exported = exported
        self.model = model

    @override
    def _write(self, path: Path) -> None:
        with quiet("coremltools"):
            self.model.save(str(path))
        # a debugging aid outside the package's manifest, as large as the program itself
        (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)


def _predict(path: Path, feeds: dict[str, Any]) -> list[Tensor]:
    """Outputs of Core ML itself, on macOS."""
    import coremltools

    model = coremltools.models.MLModel(str(path))
    try:
        outputs = model.predict(feeds)
    except Exception as error:
        raise VerificationError(f"Core ML cannot predict with {path.name}: {error}") from error
    names = [output.name for output in model.get_spec().description.output]
    return [torch.from_numpy(np.asarray(outputs[name])) for name in names]


class CoreMLBackend(Backend):
    """Lower through coremltools."""

    name: ClassVar[str] = "Core ML"
    capabilities: ClassVar[Capabilities] = Capabilities(
        index_bits=(1, 2, 3, 4, 6, 8),
        lut_dtypes=("float32", "float16", "int8", "uint8"),
        weight_types=("int4", "uint4", "int8", "uint8"),
        table_types=("int2", "uint2", "int3", "uint3", "int6", "uint6"),
        minimum=False,
        activation_types=("int8", "uint8"),
        activation_channels=False,
    )
    packed_capabilities: ClassVar[Capabilities] = Capabilities(
        index_bits=(1, 2, 4, 6, 8),
        padded_bits=(),
        grouped=False,
        vector=False,
        lut_dtypes=("float32", "float16"),
        channel_scale=False,
        sparse=False,
        weight_types=("int8", "uint8"),
        weight_blocks=False,
        minimum=False,
        activation_types=("int8", "uint8"),
        activation_channels=False,
    )

    @override
    def unsupported(self, program: Program) -> list[str]:
        return self._refusals(program, self.capabilities, "")

    @override
    def legalize(self) -> tuple[Pass, ...]:
        with quiet("coremltools"):
            register_lowerings()
        tables = frozenset(self.capabilities.table_types)
        return (DequantizeToShiftScale(), IntegersToTables(tables))

    def _refusals(self, program: Program, allowed: Capabilities, where: str) -> list[str]:
        lookups = find_lookups(program.graph_module)
        reasons = [reason for each in lookups for reason in _reasons(each, allowed, where)]
        if where == "iOS16" and find_quantized_activations(program.graph_module):
            reasons.append(
                "quantized activations for iOS16; raise minimum_deployment_target to iOS17"
            )
        if not allowed.sparse:
            reasons += [
                f"{str(weight.node.args[1]).removesuffix('_mask')}: pruned weights for {where};"
                " raise minimum_deployment_target to iOS18"
                for weight in find_sparse(program.graph_module)
            ]
        return [*reasons, *quantization_refusals(program.graph_module, allowed)]

    @override
    def lower(
        self,
        program: Program,
        *,
        minimum_deployment_target: Target = "iOS18",
        precision: Literal["float16", "float32"] = "float16",
        **options: Any,
    ) -> CoreMLArtifact:
        """Convert a program with the shapes of its example.

        Args:
            program: In our vocabulary.
            minimum_deployment_target: "iOS16" and "iOS17" take one scalar table per tensor in the
                older packed form; "iOS18" and later everything.
            precision: Type in which Core ML computes; tables are stored in it.
            options: None are known.

        Raises:
            LoweringError: An option is unknown, the deployment target cannot hold a table, or
                coremltools cannot convert the program.
        """
        known = "'minimum_deployment_target', 'precision'"
        if options:
            raise LoweringError(f"Core ML has no option {sorted(options)}; there are {known}")
        check_precision(precision)
        with quiet("coremltools"):
            ct = require("coremltools", "coreml")
        exported = self.legal_export(program, minimum_deployment_target)
        pipeline = ct.PassPipeline.DEFAULT
        # it reorders quantized tables into forms that later passes cannot shape
        pipeline.remove_passes({"common::canonicalize_quantized_lut_pattern"})
        try:
            with quiet("coremltools"), _small_constants_once():
                model = ct.convert(
                    exported,
                    minimum_deployment_target=getattr(ct.target, minimum_deployment_target),
                    compute_precision=getattr(ct.precision, precision.upper()),
                    pass_pipeline=pipeline,
                    skip_model_load=True,
                )
        except Exception as error:
            raise LoweringError(f"coremltools cannot convert the program: {error}") from error
        return CoreMLArtifact(self, program, exported, model)

    def legal_export(self, program: Program, target: str, *last: Pass) -> ExportedProgram:
        """The program in ops that coremltools translates.

        Args:
            program: In our vocabulary.
            target: Deployment target.
            last: Passes to run last.

        Raises:
            LoweringError: The deployment target is unknown or cannot hold the program.
        """
        if target not in _TARGETS:
            raise LoweringError(f"minimum_deployment_target must be one of {_TARGETS}")
        if target in ("iOS16", "iOS17"):
            reasons = self._refusals(program, self.packed_capabilities, target)
            if reasons:
                raise LoweringError(f"{self.name} cannot hold this program:\n" + "\n".join(reasons))
        quantized_ops()
        register_lowerings()
        legal = program.copy()
        run_passes(legal.graph_module, [RemoveUnused(), *self.legalize(), RemoveUnused(), *last])
        with torch.no_grad():
            return decompose_for_coreml(
                export_graph(legal.graph_module, program.example_args, program.example_kwargs)
            )

    @override
    def delegate(self, **options: Any) -> Delegate:
        from graphopt.backends.coreml.delegate import CoreMLDelegate

        return CoreMLDelegate(**options)

    @override
    def check(
        self, path: Path, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Verification:
        with quiet("coremltools"):
            loaded = load_program(path)
            known = loaded.functions["main"].inputs
            given = match_inputs(list(known), named_inputs(program, args, kwargs))
            feeds = {name: tensor.detach().cpu().numpy() for name, tensor in given.items()}
            result = evaluate(loaded, feeds)
        how = "read the package back, decompressed its weights and evaluated its MIL program"
        if result.unevaluated:
            notes = tuple(f"no rule for MIL op {op}" for op in result.unevaluated)
            partial = "read the package back and decompressed its weights only"
            return Verification(float("nan"), (), partial, False, notes, result.constexprs)
        expected = expected_outputs(program, args, kwargs)
        found = [torch.from_numpy(np.ascontiguousarray(value)) for value in result.outputs.values()]
        errors = compare_outputs(found, expected)
        notes = ()
        if platform.system() == "Darwin":
            worst = max(compare_outputs(_predict(path, feeds), expected), default=0.0)
            notes = (f"Core ML's own prediction differs by {worst:.3g}",)
            how += ", and predicted with Core ML"
        worst = max(errors, default=0.0)
        return Verification(worst, errors, how, True, notes, result.constexprs)


@contextlib.contextmanager
def _small_constants_once() -> Iterator[None]:
    """Let coremltools keep one copy of equal strides, paddings and the like.

    They are a third of a program's text. Its pass has the threshold as a class attribute, which is
    put back.
    """
    from coremltools.converters.mil.mil.passes.defs.cleanup.const_deduplication import (
        const_deduplication,
    )

    before = const_deduplication._const_threshold
    const_deduplication._const_threshold = 1
    try:
        yield
    finally:
        const_deduplication._const_threshold = before


def _reasons(lookup: Lookup, allowed: Capabilities, where: str) -> Iterator[str]:
    suffix = f" for {where}; raise minimum_deployment_target to iOS18, or" if where else ";"
    if allowed.stored_bits(lookup.n_bits) is None:
        near = min(allowed.index_bits, key=lambda bits: (abs(bits - lookup.n_bits), bits))
        yield f"{lookup.name}: {lookup.n_bits}-bit indices{suffix} use {near} bits"
    if lookup.grouped and not allowed.grouped:
        yield f"{lookup.name}: several tables{suffix} use PerTensorGranularity()"
    if lookup.entries > 1 and not allowed.vector:
        yield f"{lookup.name}: cluster_dim={lookup.entries}{suffix} use cluster_dim=1"
    if lookup.lut_dtype not in allowed.lut_dtypes:
        yield (
            f"{lookup.name}: tables of {lookup.lut_dtype}{suffix} use one of {allowed.lut_dtypes}"
        )
    if lookup.channel_scale and not allowed.channel_scale:
        yield f"{lookup.name}: a per-channel scale{suffix} use enable_per_channel_scale=False"
    if lookup.outliers and not allowed.sparse:
        yield f"{lookup.name}: sparse outliers{suffix} use outlier_fraction=0"
