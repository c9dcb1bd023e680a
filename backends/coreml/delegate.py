"""Core ML as a delegate of ExecuTorch programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from typing_extensions import override

from graphopt.audited import parse_json
from graphopt.backends.coreml.evaluate import evaluate, load_program
from graphopt.backends.coreml.left_out import LEFT_OUT
from graphopt.backends.coreml.lower import legal_export
from graphopt.backends.coreml.options import CoreMLOptions
from graphopt.backends.delegate import Delegate, Payload
from graphopt.backends.interface import as_array
from graphopt.backends.quiet import quiet
from graphopt.errors import VerificationError
from graphopt.extras import require
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.passes.pass_base import Pass

__all__ = ["CoreMLDelegate", "OneLookupPerReader"]

_PACKAGE = "model.mlpackage"
_DEBUG = ("debug_info.json", f"{_PACKAGE}/executorch_debug_handle_mapping.json")


@dataclass(frozen=True)
class OneLookupPerReader(Pass):
    """Give every reader of a compressed weight a lookup of its own.

    Before:
        %w = graphopt.lut_to_dense(%indices, %lut, 4, shape)
        %y = linear(%x, %w)
        %z = linear(%u, %w)

    After:
        %w0 = graphopt.lut_to_dense(%indices, %lut, 4, shape)
        %w1 = graphopt.lut_to_dense(%indices, %lut, 4, shape)

    A partitioner that puts the readers into different delegates would else hand the dense weight
    from one to the other.
    """

    name: ClassVar[str] = "one-lookup-per-reader"

    @override
    def run(self, edit: Editor) -> None:
        for node in reversed(list(edit.gm.graph.nodes)):
            if str(node.target).startswith("graphopt."):
                for reader in list(node.users)[1:]:
                    copied = edit.call(node.target, *node.args, like=node, **node.kwargs)
                    reader.replace_input_with(node, copied)


@dataclass(frozen=True)
class CoreMLDelegate(Delegate):
    """Lower to ExecuTorch's Core ML delegate; its payload is an .mlpackage."""

    id: ClassVar[str] = "CoreMLBackend"
    options: CoreMLOptions = field(default_factory=CoreMLOptions)

    @override
    def export(self, program: Program) -> ExportedProgram:
        return legal_export(program, self.options.minimum_deployment_target, OneLookupPerReader())

    @override
    def partitioner(self) -> Any:
        with quiet("coremltools"):
            ct = require("coremltools", "coreml")
            require("executorch.backends.apple.coreml.partition", "executorch")
        from executorch.backends.apple.coreml.compiler import CoreMLBackend as Compiler
        from executorch.backends.apple.coreml.partition import CoreMLPartitioner

        specs = Compiler.generate_compile_specs(
            minimum_deployment_target=getattr(ct.target, self.options.minimum_deployment_target),
            compute_precision=getattr(ct.precision, self.options.precision.upper()),
            pass_names=[name for name in ct.PassPipeline.DEFAULT.passes if name not in LEFT_OUT],
        )
        return CoreMLPartitioner(compile_specs=specs, lower_full_graph=True)

    @override
    def finish(self, edge: Any) -> None:
        from executorch.backends.apple.coreml import executorchcoreml

        gm = edge.exported_program().graph_module
        for node in gm.graph.find_nodes(op="get_attr"):
            held: Any = getattr(gm, str(node.target), None)
            if type(held).__name__ != "LoweredBackendModule" or held.backend_id != self.id:
                continue
            with TemporaryDirectory() as name:
                executorchcoreml.unflatten_directory_contents(held.processed_bytes, name)
                root = next(Path(name).iterdir())
                for file in _DEBUG:
                    (root / file).unlink(missing_ok=True)
                held._processed_bytes = executorchcoreml.flatten_directory_contents(str(root))
            # only the compiler reads it, and it is as large as a small layer
            held._compile_specs = [
                spec for spec in held.compile_specs if spec.key != "pass_pipeline"
            ]

    @override
    def run(self, payload: Payload, inputs: Sequence[Tensor], folder: Path) -> list[Tensor]:
        from executorch.backends.apple.coreml import executorchcoreml

        executorchcoreml.unflatten_directory_contents(payload.data, str(folder))
        root = next(folder.iterdir())
        described = parse_json((root / "metadata.json").read_bytes(), "the payload's metadata")
        with quiet("coremltools"):
            program = load_program(root / _PACKAGE)
            pairs = zip(described["inputNames"], inputs, strict=True)
            feeds = {name: as_array(tensor) for name, tensor in pairs}
            result = evaluate(program, feeds)
        if result.unevaluated:
            raise VerificationError(f"no rule for MIL ops {list(result.unevaluated)}")
        outputs = [result.outputs[name] for name in described["outputNames"]]
        return [torch.from_numpy(np.ascontiguousarray(value)) for value in outputs]
