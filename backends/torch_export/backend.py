"""The Torch backend: programs in our own ops, saved by `torch.export.save`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from typing_extensions import override

from graphopt.audited import read_exported
from graphopt.backends.base import Artifact, Backend, stored_weights
from graphopt.backends.capabilities import Capabilities
from graphopt.backends.options import TargetOptions, read_options
from graphopt.backends.torch_export.archive import Sink, deflate_texts
from graphopt.backends.torch_export.options import TorchOptions
from graphopt.backends.verification import Evaluation
from graphopt.capture.archive_check import check_archive, is_trusted
from graphopt.errors import VerificationError
from graphopt.exclusive import exclusively
from graphopt.ir.ops import STORAGE_BITS
from graphopt.ir.program import Program, export_graph
from graphopt.passes import RemoveUnused
from graphopt.passes.pass_base import Pass
from graphopt.passes.pass_manager import run_passes
from graphopt.run.batches import Batch

__all__ = ["TorchArtifact", "TorchBackend"]


class TorchArtifact(Artifact):
    """A .pt2 file; it loads with `torch.export.load` once graphopt is imported.

    Attributes:
        exported: The exported program.
    """

    def __init__(
        self,
        backend: TorchBackend,
        program: Program,
        exported: ExportedProgram,
        options: TorchOptions,
    ) -> None:
        super().__init__(backend, program, vars(options))
        self.exported = exported

    @override
    @exclusively
    def _write(self, path: Path) -> None:
        plain = path.with_name(f".plain-{path.name}")
        try:
            with plain.open("wb") as file:
                sink: Any = Sink(file)
                torch.export.save(self.exported, sink)
                sink.check()
            deflate_texts(plain, path)
        finally:
            plain.unlink(missing_ok=True)


class TorchBackend(Backend):
    """Keep our ops; holds everything."""

    name: ClassVar[str] = "Torch"
    capabilities: ClassVar[Capabilities] = Capabilities(
        index_bits=(1, 2, 3, 4, 6, 8),
        lut_dtypes=(
            "float32",
            "float16",
            "bfloat16",
            "float64",
            "int8",
            "uint8",
            "fp8_e4m3",
            "fp8_e5m2",
        ),
        weight_types=tuple(STORAGE_BITS),
        activation_types=tuple(STORAGE_BITS),
    )

    options: ClassVar[type[TargetOptions]] = TorchOptions

    @override
    def unsupported(self, program: Program) -> list[str]:
        return []

    @override
    def legalize(self) -> tuple[Pass, ...]:
        return ()

    @override
    @exclusively
    def lower(self, program: Program, **options: Any) -> TorchArtifact:
        """Export a program.

        Args:
            program: In our vocabulary.
            options: Fields of `TorchOptions`.

        Raises:
            LoweringError: An option is unknown.
        """
        chosen = read_options(TorchOptions, self.name, options)
        neutral = program.copy()
        run_passes(neutral.graph_module, [RemoveUnused()])
        exported = export_graph(
            neutral.graph_module,
            program.example_args,
            program.example_kwargs,
            dynamic=chosen.dynamic,
        )
        # the nodes of earlier graphs, by their addresses in memory
        dropped = ("from_node",) if chosen.stack_traces else ("from_node", "stack_trace")
        for module in exported.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
                for key in dropped:
                    node.meta.pop(key, None)
        return TorchArtifact(self, program, exported, chosen)

    @override
    @exclusively
    def evaluate(self, path: Path, program: Program, call: Batch) -> Evaluation:
        try:
            if not is_trusted():
                check_archive(path)
            loaded = read_exported(path).module()
            with torch.no_grad():
                result = loaded(*call[0], **call[1])
        except Exception as error:
            raise VerificationError(f"{path.name} does not load and run: {error}") from error
        outputs = tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        how = "loaded the saved program and ran it in PyTorch"
        return Evaluation(outputs, how, weights=stored_weights(program.graph_module))
