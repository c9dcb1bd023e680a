"""The Core AI backend: coreai-torch's converter and the runtime that comes with coreai-core."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from typing_extensions import override

from graphopt.backends.base import (
    Artifact,
    Backend,
    Capabilities,
    Verification,
    compare_outputs,
    expected_outputs,
)
from graphopt.backends.coreai.legalize import LegalizeForCoreAI
from graphopt.casting import cast_to_16_bit_precision
from graphopt.errors import LoweringError, VerificationError
from graphopt.extras import require
from graphopt.lookups import find_lookups
from graphopt.pass_base import Pass
from graphopt.pass_manager import run_passes
from graphopt.passes import RemoveUnused
from graphopt.program import Program, export_graph

__all__ = ["CoreAIArtifact", "CoreAIBackend"]

_log = logging.getLogger(__name__)


class CoreAIArtifact(Artifact):
    """A Core AI program; saves as .aimodel and runs on the Core AI runtime.

    Attributes:
        exported: What was converted, in `coreai::` ops.
        ai_program: The converted program.
    """

    suffix: ClassVar[str] = ".aimodel"

    def __init__(self, program: Program, exported: ExportedProgram, ai_program: Any) -> None:  # noqa: ANN401
        super().__init__(program)
        self.exported = exported
        self.ai_program = ai_program

    @override
    def _write(self, path: Path) -> None:
        self.ai_program.save_asset(path)

    @override
    def _verify(self, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Verification:
        found = self.run(path, args, kwargs)
        errors = compare_outputs(found, expected_outputs(self.program, args, kwargs))
        lookups = sum("lut_to_dense" in str(n.target) for n in self.exported.graph.nodes)
        return Verification(
            max(errors, default=0.0), errors, "ran the saved asset on the Core AI runtime",
            weights=lookups,
        )  # fmt: skip

    def run(
        self, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> list[Tensor]:
        """Execute the asset at `path`; outputs in the program's order.

        Raises:
            VerificationError: The runtime refuses the asset or the inputs.
        """
        require("coreai.runtime", "coreai")
        from coreai.authoring import AIModelAsset
        from coreai.runtime import NDArray

        leaves = pytree.tree_leaves((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        names = [name for name in self.exported.graph_signature.user_inputs if isinstance(name, str)]
        wanted = {node.name: node.meta.get("val") for node in self.exported.graph.nodes}
        feeds = {
            name: NDArray(_as_stored(tensor, wanted[name]))
            for name, tensor in zip(names, tensors, strict=True)
        }

        async def execute() -> list[Tensor]:
            async with AIModelAsset.load(path).executable() as model:
                function = model.load_function("main")
                known = set(function.desc.input_names)
                result = await function({k: v for k, v in feeds.items() if k in known})
                # the mapping is not in the order of the outputs
                arrays = [np.array(result[name].numpy()) for name in function.desc.output_names]
                return [torch.from_numpy(array) for array in arrays]

        try:
            return _run_async(execute())
        except Exception as error:
            raise VerificationError(f"{path.name} does not run on the Core AI runtime: {error}") from error


def _as_stored(tensor: Tensor, value: object) -> np.ndarray[Any, Any]:
    """An input in the type that the asset takes: 64-bit integers are narrowed to 32."""
    dtype = value.dtype if isinstance(value, Tensor) else tensor.dtype
    dtype = {torch.int64: torch.int32, torch.float64: torch.float32}.get(dtype, dtype)
    return np.ascontiguousarray(tensor.detach().cpu().to(dtype).numpy())


def _run_async(work: Coroutine[Any, Any, list[Tensor]]) -> list[Tensor]:
    """Run a coroutine also where an event loop runs already, as in a notebook."""
    outcome: list[Any] = []

    def target() -> None:
        try:
            outcome.append(asyncio.run(work))
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=target, name="graphopt-coreai")
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]  # type: ignore[no-any-return]


class CoreAIBackend(Backend):
    """Lower through coreai-torch."""

    name: ClassVar[str] = "Core AI"
    capabilities: ClassVar[Capabilities] = Capabilities(
        index_bits=(1, 2, 4, 6, 8),
        padded_bits=((3, 4),),
        lut_dtypes=("float32", "float16", "int8", "uint8", "fp8_e4m3", "fp8_e5m2"),
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
        return reasons

    @override
    def legalize(self) -> tuple[Pass, ...]:
        return (LegalizeForCoreAI(),)

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
        coreai_torch = require("coreai_torch", "coreai")
        legal = program.copy()
        run_passes(legal.graph_module, [RemoveUnused(), *self.legalize()])
        with torch.no_grad():
            exported = export_graph(
                legal.graph_module, program.example_args, program.example_kwargs
            ).run_decompositions(coreai_torch.get_decomp_table())
            if precision == "float16":
                exported = cast_to_16_bit_precision(exported)
            try:
                converter = coreai_torch.TorchConverter().add_exported_program(exported)
                ai_program = converter.to_coreai()
            except Exception as error:
                raise LoweringError(f"coreai-torch cannot convert the program: {error}") from error
        return CoreAIArtifact(program, exported, ai_program)
