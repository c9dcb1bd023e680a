"""The Core AI backend: coreai-torch's converter and the runtime that comes with coreai-core."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from typing_extensions import override

from graphopt.analysis.stored_values import find_lookups
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
    stored_weights,
)
from graphopt.backends.casting import cast_to_16_bit_precision
from graphopt.backends.coreai.legalize import LegalizeForCoreAI
from graphopt.backends.coreai.legalize_quantization import LegalizeQuantizationForCoreAI
from graphopt.backends.coreai.raise_ import RaiseFromCoreAI
from graphopt.backends.delegate import Delegate
from graphopt.backends.quiet import quiet
from graphopt.errors import LoweringError, VerificationError
from graphopt.extras import require
from graphopt.ir.program import Program, export_graph
from graphopt.passes import IntegersToTables, RemoveUnused
from graphopt.passes.pass_base import Pass
from graphopt.passes.pass_manager import run_passes

__all__ = ["CoreAIArtifact", "CoreAIBackend", "run_asset"]


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
    ) -> None:
        super().__init__(backend, program)
        self.exported = exported
        self.ai_program = ai_program

    @override
    def _write(self, path: Path) -> None:
        self.ai_program.save_asset(path)


def run_asset(path: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Execute the saved asset at `path` on the Core AI runtime.

    Args:
        path: An .aimodel.
        inputs: By the names of the graph's inputs; they are converted to the types that the asset
            takes (64-bit integers to 32).

    Returns:
        Outputs in the program's order.

    Raises:
        VerificationError: The runtime refuses the asset or the inputs.
    """
    require("coreai.runtime", "coreai")
    from coreai.authoring import AIModelAsset
    from coreai.runtime import NDArray

    async def execute() -> list[Tensor]:
        async with AIModelAsset.load(path).executable() as model:
            function = model.load_function("main")
            feeds = {}
            for name, tensor in match_inputs(function.desc.input_names, inputs).items():
                dtype = np.dtype(function.desc.input_descriptor(name).dtype)
                array = tensor.detach().cpu().numpy().astype(dtype)
                feeds[name] = NDArray(np.ascontiguousarray(array))
            result = await function(feeds)
            # the mapping is not in the order of the outputs
            arrays = [np.array(result[name].numpy()) for name in function.desc.output_names]
            return [torch.from_numpy(array) for array in arrays]

    try:
        return _run_async(execute())
    except Exception as error:
        raise VerificationError(
            f"{path.name} does not run on the Core AI runtime: {type(error).__name__}: {error}"
        ) from error


def _run_async(work: Coroutine[Any, Any, list[Tensor]]) -> list[Tensor]:
    """Run a coroutine also where an event loop runs already, as in a notebook."""
    with ThreadPoolExecutor(1, thread_name_prefix="graphopt-coreai") as pool:
        return pool.submit(asyncio.run, work).result()


class CoreAIBackend(Backend):
    """Lower through coreai-torch."""

    name: ClassVar[str] = "Core AI"
    capabilities: ClassVar[Capabilities] = Capabilities(
        index_bits=(1, 2, 4, 6, 8),
        padded_bits=((3, 4),),
        lut_dtypes=("float32", "float16", "int8", "uint8", "fp8_e4m3", "fp8_e5m2"),
        weight_types=("int2", "int4", "uint4", "int8", "uint8", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1"),
        table_types=("uint2", "int3", "uint3", "int6", "uint6"),
        activation_types=("int8", "uint8", "fp8_e4m3", "fp8_e5m2"),
    )

    @override
    def unsupported(self, program: Program) -> list[str]:
        reasons = []
        for lookup in find_lookups(program.graph_module):
            stored = self.capabilities.stored_bits(lookup.n_bits)
            if stored is None:
                reasons.append(
                    f"{lookup.name}: {lookup.n_bits}-bit indices; the nearest that work are"
                    f" {self.capabilities.index_bits}"
                )
            if lookup.lut_dtype not in self.capabilities.lut_dtypes:
                reasons.append(
                    f"{lookup.name}: tables of {lookup.lut_dtype}; use one of"
                    f" {self.capabilities.lut_dtypes}"
                )
        return [*reasons, *quantization_refusals(program.graph_module, self.capabilities)]

    @override
    def legalize(self) -> tuple[Pass, ...]:
        return (
            IntegersToTables(frozenset(self.capabilities.table_types)),
            LegalizeQuantizationForCoreAI(),
            LegalizeForCoreAI(),
        )

    @override
    def raise_(self) -> tuple[Pass, ...]:
        return (RaiseFromCoreAI(),)

    @override
    def lower(
        self,
        program: Program,
        *,
        precision: Literal["float32", "float16"] = "float32",
        **options: Any,
    ) -> CoreAIArtifact:
        """Convert a program with the shapes of its example.

        Args:
            program: In our vocabulary.
            precision: "float16" casts floats to 16 bits first (`graphopt.casting`).
            options: None are known.

        Raises:
            LoweringError: An option is unknown, or coreai-torch cannot convert the program.
        """
        if options:
            raise LoweringError(f"Core AI has no option {sorted(options)}; there is 'precision'")
        with quiet("coreai_torch"):
            coreai_torch = require("coreai_torch", "coreai")
        with torch.no_grad():
            exported = self.legal_export(program, precision)
            try:
                with quiet("coreai_torch"):
                    converter = coreai_torch.TorchConverter().add_exported_program(exported)
                    ai_program = converter.to_coreai()
            except Exception as error:
                raise LoweringError(f"coreai-torch cannot convert the program: {error}") from error
        return CoreAIArtifact(self, program, exported, ai_program)

    def legal_export(self, program: Program, precision: str) -> ExportedProgram:
        """The program in Core AI's ops, decomposed as coreai-torch wants it.

        Raises:
            LoweringError: There is no such precision.
        """
        check_precision(precision)
        with quiet("coreai_torch"):
            coreai_torch = require("coreai_torch", "coreai")
        legal = program.copy()
        run_passes(legal.graph_module, [RemoveUnused(), *self.legalize()])
        with torch.no_grad():
            exported = export_graph(
                legal.graph_module, program.example_args, program.example_kwargs
            ).run_decompositions(coreai_torch.get_decomp_table())
            return cast_to_16_bit_precision(exported) if precision == "float16" else exported

    @override
    def delegate(self, **options: Any) -> Delegate:
        from graphopt.backends.coreai.delegate import CoreAIDelegate

        return CoreAIDelegate(**options)

    @override
    def check(
        self, path: Path, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Verification:
        found = run_asset(path, named_inputs(program, args, kwargs))
        errors = compare_outputs(found, expected_outputs(program, args, kwargs))
        how = "ran the saved asset on the Core AI runtime"
        weights = stored_weights(program.graph_module)
        return Verification(max(errors, default=0.0), errors, how, weights=weights)
