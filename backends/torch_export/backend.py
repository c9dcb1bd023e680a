"""The Torch backend: programs in our own ops, saved by `torch.export.save`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from typing_extensions import Unpack, override

from graphopt.audited import read_exported
from graphopt.backends.base import Artifact, Backend, stored_weights
from graphopt.backends.capabilities import Capabilities
from graphopt.backends.data_sizes import decomposing_for
from graphopt.backends.options import LoweringKeywords, TargetOptions, read_options
from graphopt.backends.shapes import EXAMPLE_SHAPES, plan_shapes
from graphopt.backends.torch_export.archive import Sink, deflate_texts
from graphopt.backends.torch_export.options import TorchOptions
from graphopt.backends.torch_export.quick_saving import quick_saving
from graphopt.backends.verification import Evaluation
from graphopt.capture.archive_check import check_archive, is_trusted
from graphopt.capture.exporting import run_on_copies
from graphopt.errors import VerificationError
from graphopt.exclusive import exclusively
from graphopt.files import work_path
from graphopt.ir import torch_private
from graphopt.ir.ops import STORAGE_BITS
from graphopt.ir.program import Program, export_graph
from graphopt.ir.state import state_of, with_state
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
        _write_archive(path, lambda sink: torch.export.save(self.exported, sink))


def _write_archive(path: Path, write: Callable[[Any], object]) -> None:
    """What `write` puts into an archive, with its texts deflated."""
    plain = work_path(path)
    try:
        with plain.open("wb") as file:
            sink = Sink(file)
            with quick_saving():
                write(sink)
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
        dynamic_floats=True,
        power_scales="all",
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
    def lower(self, program: Program, **options: Unpack[LoweringKeywords]) -> TorchArtifact:
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
        word = chosen.shapes if isinstance(chosen.shapes, str) else ""
        plan = EXAMPLE_SHAPES
        if word != "captured":
            plan = plan_shapes(program, chosen.shapes, self.name)
        as_captured = word in ("captured", "open")
        with decomposing_for(self.name, neutral.graph_module):
            exported = export_graph(
                neutral.graph_module,
                program.example_args,
                program.example_kwargs,
                dynamic=word == "open" or (as_captured and chosen.dynamic),
                limits=None if as_captured else plan.limits(neutral),
            )
        # the nodes of earlier graphs, by their addresses in memory
        dropped = ("from_node",) if chosen.stack_traces else ("from_node", "stack_trace")
        for module in exported.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
                for key in dropped:
                    node.meta.pop(key, None)
        artifact = TorchArtifact(self, program, exported, chosen)
        artifact.shapes = plan
        return artifact

    @override
    @exclusively
    def write_set(self, path: Path, methods: Mapping[str, Artifact]) -> None:
        exported = {
            name: artifact.exported
            for name, artifact in methods.items()
            if isinstance(artifact, TorchArtifact)
        }
        _write_archive(
            path, lambda sink: torch_private.package_pt2(sink, exported_programs=exported)
        )

    @override
    @exclusively
    def evaluate_set(
        self, path: Path, programs: Mapping[str, Program], calls: Sequence[tuple[str, Batch]]
    ) -> list[Evaluation]:
        how = "loaded the saved programs and ran them in PyTorch"
        names = {name: state_of(program.graph_module) for name, program in programs.items()}
        evaluations: list[Evaluation] = []
        state: dict[str, Tensor] = {}
        try:
            if not is_trusted():
                check_archive(path)
            archive = torch_private.load_pt2(str(path))
            loaded = {name: archive.exported_programs[name].module() for name in programs}
            for name, (args, kwargs) in calls:
                module = loaded[name]
                with_state(module, {key: state[key] for key in names[name] if key in state})
                with torch.no_grad():
                    leaves = pytree.tree_leaves(run_on_copies(module, args, kwargs))
                state |= {key: module.get_buffer(key) for key in names[name]}
                outputs = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
                weights = stored_weights(programs[name].graph_module)
                evaluations.append(Evaluation(outputs, how, weights=weights))
        except Exception as error:
            raise VerificationError(f"{path.name} does not load and run: {error}") from error
        return evaluations

    @override
    def runner(self, path: Path, program: Program, call: Batch) -> Callable[[], object]:
        try:
            if not is_trusted():
                check_archive(path)
            loaded = read_exported(path).module()
        except Exception as error:
            raise VerificationError(f"{path.name} does not load: {error}") from error

        def run() -> None:
            with torch.no_grad():
                loaded(*call[0], **call[1])

        return run

    @override
    @exclusively
    def evaluate_sequence(
        self, path: Path, program: Program, calls: Sequence[Batch]
    ) -> list[Evaluation]:
        how = "loaded the saved program and ran it in PyTorch"
        names, weights = state_of(program.graph_module), stored_weights(program.graph_module)
        evaluations = []
        try:
            if not is_trusted():
                check_archive(path)
            loaded = read_exported(path).module()
            for args, kwargs in calls:
                with torch.no_grad():
                    leaves = pytree.tree_leaves(run_on_copies(loaded, args, kwargs))
                outputs = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
                state = tuple(loaded.get_buffer(name).clone() for name in names)
                evaluations.append(Evaluation(outputs, how, weights=weights, state=state))
        except Exception as error:
            raise VerificationError(f"{path.name} does not load and run: {error}") from error
        return evaluations
