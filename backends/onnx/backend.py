"""The ONNX backend: torch's exporter, and ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import Unpack, override

from graphopt.backends.base import Artifact, Backend, stored_size, stored_weights
from graphopt.backends.capabilities import Capabilities
from graphopt.backends.onnx.check import check_model, run_calls, runner_of
from graphopt.backends.onnx.external_data import data_of, settle_data
from graphopt.backends.onnx.lower import COMPLEX_NUMBERS, LACKS, TABLE_TYPES, legal_passes, to_model
from graphopt.backends.onnx.options import ONNXOptions
from graphopt.backends.onnx.refusals import refusals
from graphopt.backends.onnx.state import initial_state
from graphopt.backends.onnx.tables import PADDED
from graphopt.backends.options import LoweringKeywords, TargetOptions, read_options
from graphopt.backends.shapes import plan_shapes
from graphopt.backends.verification import Evaluation
from graphopt.exclusive import exclusively
from graphopt.ir.program import Program
from graphopt.passes.pass_base import Pass
from graphopt.run.batches import Batch

__all__ = ["ONNXArtifact", "ONNXBackend"]

MOST_BYTES = 2**31 - 2**24  # of a message of protobuf, with room for the graph


class ONNXArtifact(Artifact):
    """An ONNX model; saves as .onnx and runs in ONNX Runtime.

    Weights beyond what one message of protobuf holds, 2 GB, are in a file beside it,
    `<name>.onnx.data`.

    Attributes:
        model: Of onnx_ir.
    """

    def __init__(
        self, backend: ONNXBackend, program: Program, model: Any, options: ONNXOptions
    ) -> None:
        super().__init__(backend, program, vars(options))
        self.model = model
        self._written: Path | None = None

    @property
    def initial_state(self) -> dict[str, Tensor]:
        """What the `past_` inputs get in the first call of a sequence."""
        return initial_state(self.program)

    @override
    @exclusively
    def _write(self, path: Path) -> None:
        import onnx_ir as ir

        held = sum(value.const_value.nbytes for value in self.model.graph.initializers.values())
        if held <= MOST_BYTES:
            ir.save(self.model, path)
            return
        self._written = data_of(path)
        ir.save(self.model, path, external_data=self._written.name)

    @override
    @exclusively
    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        verify: bool | Iterable[Any] = True,
        max_error: float | None = None,
    ) -> Path:
        self._written = None
        try:
            target = super().save(path, overwrite=overwrite, verify=verify, max_error=max_error)
        except BaseException:
            if self._written is not None:
                self._written.unlink(missing_ok=True)
            raise
        settle_data(target, self._written)
        return target

    @property
    @override
    def size(self) -> int:
        """Bytes on disk, with those of the file beside it.

        Raises:
            StateError: The artifact was not saved.
        """
        whole = super().size
        assert self.path is not None
        beside = data_of(self.path)
        return whole + (stored_size(beside) if beside.exists() else 0)


class ONNXBackend(Backend):
    """Lower through torch.onnx."""

    name: ClassVar[str] = "ONNX"
    capabilities: ClassVar[Capabilities] = Capabilities(
        index_bits=(1, 2, 3, 4, 6, 8),
        padded_bits=PADDED,
        lut_dtypes=("float32", "float16", "int8", "uint8", "fp8_e4m3", "fp8_e5m2"),
        weight_types=("int4", "uint4", "int8", "uint8", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1"),
        table_types=TABLE_TYPES,
        lacks=LACKS,
        complex_numbers=COMPLEX_NUMBERS,
        bfloat16_scales=False,
        activation_types=("int8", "uint8", "int4", "uint4", "fp8_e4m3", "fp8_e5m2"),
    )
    options: ClassVar[type[TargetOptions]] = ONNXOptions

    @override
    def unsupported(self, program: Program) -> list[str]:
        return refusals(program, self.capabilities)

    @override
    def legalize(self) -> tuple[Pass, ...]:
        return legal_passes()

    @override
    @exclusively
    def lower(self, program: Program, **options: Unpack[LoweringKeywords]) -> ONNXArtifact:
        """Convert a program.

        Args:
            program: In our vocabulary.
            options: Fields of `ONNXOptions`.

        Raises:
            LoweringError: An option is unknown, or torch's exporter cannot convert the program.
        """
        chosen = read_options(ONNXOptions, self.name, options)
        word = chosen.shapes if isinstance(chosen.shapes, str) else ""
        if word == "captured":
            return ONNXArtifact(self, program, to_model(program, chosen), chosen)
        plan = plan_shapes(program, chosen.shapes, self.name)
        model = to_model(program, replace(chosen, dynamic=False), plan)
        artifact = ONNXArtifact(self, program, model, chosen)
        artifact.shapes = plan
        return artifact

    @override
    def runner(self, path: Path, program: Program, call: Batch) -> Callable[[], object]:
        tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
        return runner_of(path, tensors, initial_state(program))

    @override
    @exclusively
    def evaluate_sequence(
        self, path: Path, program: Program, calls: Sequence[Batch]
    ) -> list[Evaluation]:
        check_model(path)
        given = [
            [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
            for call in calls
        ]
        how = "checked the saved model and ran it in ONNX Runtime"
        weights = stored_weights(program.graph_module)
        # its values are in the program's order, which is that of `initial_state`
        return [
            Evaluation(tuple(outputs), how, weights=weights, state=tuple(state.values()))
            for outputs, state in run_calls(path, given, initial_state(program))
        ]
