"""Compressor: the life cycle that every compressor class has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.export import ExportedProgram

from graphopt.backends.registry import DEFAULT, ExportBackend
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.compressors.finalized import Weights, finalized
from graphopt.compressors.pipeline import PausedRun, Pipeline
from graphopt.errors import InputError, StateError
from graphopt.extras import deferred
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.program import Program
from graphopt.prepared.state import parts_of
from graphopt.prepared.training_form import train_as_model

if TYPE_CHECKING:
    from graphopt.report import stored
    from graphopt.report.table import CompressionTable
else:
    stored = deferred("graphopt.report.stored")

__all__ = ["Compressor"]


class Compressor(ABC):
    """A pipeline that pauses at `prepare`, so that its user can calibrate or train, and goes on later.

    Args:
        model: A module, an `ExportedProgram`, or a `Program`; it is never changed.

    Raises:
        InputError: `model` is something else.
    """

    compresses: ClassVar[str]

    def __init__(self, model: nn.Module | ExportedProgram | Program) -> None:
        if not isinstance(model, nn.Module | ExportedProgram | Program):
            raise InputError(
                f"model must be a module, an ExportedProgram or a Program, got {type(model).__name__}"
            )
        self._model = model
        self._run: PausedRun | None = None
        self._prepared: CapturedModule | None = None
        self._trains_as_model = False

    def __repr__(self) -> str:
        state = "not prepared" if self._run is None else "prepared"
        return f"{type(self).__name__}({type(self._model).__name__}, {state})"

    @abstractmethod
    def prepare(
        self,
        example_inputs: tuple[Any, ...] | Tensor | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
    ) -> CapturedModule:
        """Run the pipeline up to where its user comes in.

        Args:
            example_inputs: Inputs of one call.
            example_kwargs: Keyword inputs of that call.

        Raises:
            CaptureError: The model cannot be exported.
            StateError: `prepare` was called before.
        """

    @abstractmethod
    def program(self, model: nn.Module | None = None) -> CompressedProgram:
        """The compressed program in our neutral vocabulary.

        Args:
            model: None, or what `prepare` returned (or a trained copy of it).

        Raises:
            InputError: `model` is something else.
            StateError: `prepare` was not called.
        """

    def finalize(
        self,
        model: nn.Module | None = None,
        backend: ExportBackend | str = DEFAULT,
        *,
        weights: Weights = "stored",
        mmap_dir: str | Path | None = None,
    ) -> CapturedModule:
        """Turn what was prepared into constants and ops of a backend.

        Args:
            model: None, or what `prepare` returned (after training, or a trained copy of it).
            backend: Whose ops the module holds; `ExportBackend.Torch` keeps our neutral ones.
            weights: "stored" keeps codes and tables; "dense", for `ExportBackend.Torch`, has the
                floats that they stand for, as coreai-opt's does: faster to evaluate, and as large
                as the model was.
            mmap_dir: An empty or new folder that the tensors move to; the module reads them from
                there as long as it lives.

        Returns:
            A callable module, ready for `torch.export.export`.

        Raises:
            StateError: `prepare` was not called.
            InputError: Dense weights for another target, or `mmap_dir` holds something.
            LoweringError: The backend cannot hold the program; the message says what and why.
        """
        return finalized(self.program(model), backend, weights, mmap_dir)

    def summary(self, backend: ExportBackend | str | None = None) -> CompressionTable:
        """One row per candidate tensor: what was done, or why not.

        Args:
            backend: Count sizes as this target stores them (Core AI keeps 3-bit codes as 4-bit
                ones); None counts the codes' own width.

        Raises:
            LoweringError: There is no such target.
            StateError: `prepare` was not called.
        """
        return stored.as_stored(self.program(), backend)

    def _refuse_second_prepare(self) -> None:
        if self._run is not None:
            raise StateError(f"prepare() was called before; make a new {type(self).__name__}")

    def _pause(
        self,
        pipeline: Pipeline,
        before: str,
        example_inputs: tuple[Any, ...] | Tensor | None,
        example_kwargs: Mapping[str, Any] | None,
        dynamic_shapes: Any = "auto",
    ) -> PausedRun:
        """Run a pipeline on the model, up to a pass.

        Args:
            pipeline: What is run.
            before: Name of the pass that waits.
            example_inputs: Inputs of one call.
            example_kwargs: Keyword inputs of that call.
            dynamic_shapes: As for `graphopt.capture`, where the model is no program yet.
        """
        return pipeline.pause(before, self._model, example_inputs, example_kwargs, dynamic_shapes)

    @staticmethod
    def _load(prepared: CapturedModule, state_dict: Mapping[str, Tensor]) -> None:
        """Take the state of a model that was prepared with the same config.

        Raises:
            InputError: Names or shapes differ.
        """
        try:
            prepared.load_state_dict(dict(state_dict))
        except RuntimeError as error:
            raise InputError(
                "state_dict does not fit; it must come from a model that was prepared with the same"
                f" config and inputs: {error}"
            ) from None

    def _ready(self) -> CapturedModule:
        """What `prepare` returned."""
        if self._prepared is None:
            raise StateError("call prepare(example_inputs) first")
        return self._prepared

    def _start_training(self) -> CapturedModule:
        """The prepared module in training, with the model's dropout of attention."""
        prepared, program = self._ready(), self._waiting().program
        model = getattr(self._model, "_orig_mod", self._model)  # what torch.compile wraps
        if not self._trains_as_model and isinstance(model, nn.Module):
            if not isinstance(model, CapturedModule):
                train_as_model(prepared, model, program.example_args, program.example_kwargs)
            self._trains_as_model = True
        return prepared.train()

    def _waiting(self) -> PausedRun:
        """The run that waits for `program`."""
        self._ready()
        assert self._run is not None
        return self._run

    def _from_prepare(
        self, model: nn.Module | None, part: type[nn.Module] | None
    ) -> CapturedModule:
        """What `prepare` returned, or a copy of it that was trained elsewhere.

        Args:
            model: None, or the copy.
            part: What a copy must contain, where prepared modules always contain one.

        Raises:
            InputError: It is no such module.
        """
        prepared = self._ready()
        if model is None:
            return prepared
        if isinstance(model, CapturedModule) and (part is None or parts_of(model, part)):
            return model
        raise InputError(f"model must come from prepare(), got {type(model).__name__}")
