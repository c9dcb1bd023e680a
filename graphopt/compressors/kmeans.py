"""KMeansPalettizer: the compressor class of palettization, without data or calibrated."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.export import ExportedProgram

from graphopt.backends.lowering import convert_for
from graphopt.capture import capture
from graphopt.compressors.calibration import Calibrator, algorithms_of, shapes_to_weigh
from graphopt.compressors.compressed_program import CompressedProgram, compressed
from graphopt.compressors.training import PaletteTraining
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.errors import InputError, StateError
from graphopt.fitting.sensitivity import LossFn, load_sensitivities, save_sensitivities
from graphopt.ir.captured_module import CapturedModule, holder_of, set_tensor
from graphopt.ir.program import Program
from graphopt.ir.records import CompressionTable
from graphopt.passes import (
    AnnotatePalettization,
    FakePalettize,
    FoldBatchNorm,
    PalettizeWeights,
    RemoveUnused,
    cluster_annotated,
)
from graphopt.passes.pass_manager import run_passes
from graphopt.progress import track
from graphopt.report.stored import as_stored
from graphopt.run.layerwise import as_batch
from graphopt.schemes.palettize import PalettizedWeight
from graphopt.specs import DKMTrainingSpec, ExportBackend

__all__ = ["KMeansPalettizer"]

_log = logging.getLogger(__name__)


class KMeansPalettizer:
    """Replace weights by tables of centroids and indices.

    >>> palettizer = KMeansPalettizer(model, KMeansPalettizerConfig.presets.w4())
    >>> prepared = palettizer.prepare(example_inputs)     # computes with the palettes
    >>> with palettizer.calibration_mode(loss_fn=F.cross_entropy) as skm:    # optional
    ...     for x, y in batches:
    ...         skm.step(prepared(x), y)
    >>> finalized = palettizer.finalize(backend=ExportBackend.CoreAI)

    Args:
        model: A module, an `ExportedProgram`, or a `Program`; it is never changed.
        config: What becomes of which weight; 4 bits per tensor everywhere by default.
    """

    compresses: ClassVar[str] = "weights"

    _strategy: ClassVar[DKMTrainingSpec | None] = None

    def __init__(
        self,
        model: nn.Module | ExportedProgram | Program,
        config: KMeansPalettizerConfig | None = None,
    ) -> None:
        if not isinstance(model, nn.Module | ExportedProgram | Program):
            raise InputError(
                f"model must be a module, an ExportedProgram or a Program, got {type(model).__name__}"
            )
        self._model = model
        self._config = KMeansPalettizerConfig() if config is None else config
        self._annotated: Program | None = None
        self._fitted: Program | None = None
        self._prepared: CapturedModule | None = None
        self._sensitivities: dict[str, Tensor] = {}
        self._training: PaletteTraining | None = None
        self._seed = 0
        self._palettes: dict[str, PalettizedWeight] = {}
        self._summary = CompressionTable(())

    def prepare(
        self,
        example_inputs: tuple[Any, ...] | Tensor | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        dynamic_shapes: Any = "auto",
        fold_batch_norm: bool = False,
        sensitivity_path: str | Path | None = None,
        on_unmatched: Literal["error", "warn"] = "error",
        num_workers: int = 1,
        progress: bool | None = None,
        seed: int = 0,
    ) -> CapturedModule:
        """Capture the model and cluster its weights.

        Args:
            example_inputs: Inputs of one call.
            example_kwargs: Keyword inputs of that call.
            dynamic_shapes: As for `graphopt.capture`.
            fold_batch_norm: Fold batch norms into the convolutions before them first. Artifacts
                get smaller and faster by one op per norm, but the norms' names leave the state
                dict, and one table has to serve channels of different gains.
            sensitivity_path: File of `save_sensitivities`, by which errors are weighed.
            on_unmatched: Whether a config key that matches no module, op or state raises or warns.
            num_workers: Accepted for compatibility; clustering uses torch's threads.
            progress: Show a bar; None shows it on a terminal.
            seed: Seed of vector tables.

        Returns:
            A module with the model's signature and state-dict names that computes with the
            palettized weights. It shares nothing with the model.

        Raises:
            CaptureError: The model cannot be exported.
            ConfigError: A config key matches nothing.
            CompressionError: A weight contains NaN or Inf.
            InputError: `sensitivity_path` cannot be read or belongs to another model.
            StateError: `prepare` was called before.
        """
        if self._annotated is not None:
            raise StateError("prepare() was called before; make a new KMeansPalettizer")
        if num_workers != 1:
            _log.info("num_workers has no effect: clustering uses torch's threads")
        program = self._model
        if not isinstance(program, Program):
            program = capture(program, example_inputs, example_kwargs, dynamic_shapes)
        elif example_inputs is not None or example_kwargs:
            args = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs or ()
            program = program.with_example(tuple(args), dict(example_kwargs or {}))
        annotated = program.copy()
        gm = annotated.graph_module
        if fold_batch_norm:
            run_passes(gm, [FoldBatchNorm(), RemoveUnused()])
        run_passes(gm, [AnnotatePalettization(self._config, on_unmatched)])
        self._annotated, self._seed = annotated, seed
        if sensitivity_path is not None:
            self._sensitivities = load_sensitivities(sensitivity_path, shapes_to_weigh(annotated))
        self._palettes = cluster_annotated(
            gm, progress=progress, seed=seed, importance=self._sensitivities
        )
        fake = annotated.copy().graph_module
        run_passes(fake, [FakePalettize(self._palettes)])
        self._summary = fake.meta["graphopt.table"]
        _log.info(
            "palettized %d of %d tensors to %.3f bits per weight",
            len(self._summary.palettized),
            len(self._summary),
            self._summary.bits_per_weight,
        )
        for row in self._summary.skipped:
            _log.info("left %s as it is: %s", row.name, row.detail)
        self._prepared = copy.deepcopy(fake)
        return self._prepared

    @contextmanager
    def calibration_mode(
        self,
        model: nn.Module | None = None,
        *,
        loss_fn: LossFn | None = None,
        sensitivity_path: str | Path | None = None,
        label_free: Literal["mse", "kl"] = "mse",
        per_sample: bool = True,
        correct_bias: bool = True,
        mmap_dir: str | Path | None = None,
        progress: bool | None = None,
    ) -> Iterator[Calibrator]:
        """Weigh the weights by data; tables and codes are found anew when the context exits.

        Inside, the prepared module computes with the original weights. Call it on each batch and
        hand its output to `step`; or only call it, and the label-free loss runs on the same inputs
        at the exit. What is done depends on the spec's `algorithm`: "auto" and "skm" weigh squared
        errors by the mean squared gradient of a sample's loss (Kim et al., SqueezeLLM, arXiv
        2306.07629, equation 3), "gptq" fits the outputs layer by layer, "kmeans" stays as it is.
        If the context is left by an exception, everything stays as before.

        Args:
            model: Accepted for compatibility: None, or what `prepare` returned.
            loss_fn: `loss_fn(output, target)`: mean over the batch, or one value per sample. None
                takes a label-free loss.
            sensitivity_path: Where to save the sensitivities at the exit.
            label_free: "mse", or "kl" for models that return logits.
            per_sample: Square the gradients of single samples, as the source does; False takes
                `E[δ²]·E[x²]`.
            correct_bias: With "gptq", let biases take up the mean error of their layer.
            mmap_dir: Folder for the sums of squares, one file per weight; None keeps them in memory.
            progress: Show bars; None shows them on a terminal.

        Yields:
            An object with `step(output, target)`.

        Raises:
            StateError: `prepare` was not called.
            CalibrationError: No data ran inside the context.
            InputError: The loss has no gradient.
        """
        del model
        annotated, prepared = self._ready()
        calibrator = Calibrator(
            annotated,
            loss_fn=loss_fn,
            label_free=label_free,
            per_sample=per_sample,
            squares=sensitivity_path is not None,
            folder=None if mmap_dir is None else Path(mmap_dir),
            seed=self._seed,
        )
        with calibrator.watching(prepared):
            yield calibrator
        calibrator.collect(prepared, progress)
        found, biases, remarks = calibrator.palettes(
            self._seed, progress, correct_bias=correct_bias
        )
        self._sensitivities = calibrator.collector.sums
        self._take(found, biases, remarks)
        if sensitivity_path is not None:
            self.save_sensitivities(sensitivity_path)

    def calibrate(
        self, data: Iterable[Any], *, progress: bool | None = None, **options: Any
    ) -> CapturedModule:
        """Run `data`, inputs of one call each, through `calibration_mode` without labels.

        Args:
            data: Each a tensor, a tuple or list of positional inputs, or a dict of keyword inputs.
            progress: Show bars; None shows them on a terminal.
            options: Further options of `calibration_mode`.
        """
        _, prepared = self._ready()
        with self.calibration_mode(progress=progress, **options) as calibrator:
            total = len(data) if isinstance(data, Sized) else 0
            for inputs in track(data, "gradients", total, enabled=progress):
                args, kwargs = as_batch(inputs)
                calibrator.step(prepared(*args, **kwargs))
        return prepared

    @contextmanager
    def training_mode(self, model: nn.Module | None = None) -> Iterator[CapturedModule]:
        """Train with palettes; any optimizer and loop will do.

        From the first call on, the prepared module holds trainable weights under the model's names
        and computes with palettes that follow them: in training as the spec's
        `training_strategy_spec` says (gradients pass straight through by default), in evaluation
        with the nearest table entries. Batch norms and dropouts train as well.

        Args:
            model: Accepted for compatibility: None, or what `prepare` returned.

        Raises:
            StateError: `prepare` was not called.
        """
        del model
        training = self._train()
        training.prepared.train()
        training.follow()
        try:
            yield training.prepared
        finally:
            training.leave()

    def step(self) -> None:
        """Count a training step for the schedules.

        Raises:
            StateError: `prepare` was not called.
        """
        training = self._train()
        training.steps += 1
        training.follow()

    def _train(self) -> PaletteTraining:
        annotated, prepared = self._ready()
        if self._training is None:
            self._training = PaletteTraining(
                self._fitted or annotated, prepared, self._palettes, self._config, self._strategy
            )
        return self._training

    def save_sensitivities(self, path: str | Path) -> Path:
        """Write the sensitivities of the last calibration as safetensors.

        Raises:
            StateError: There was no calibration that collected any.
        """
        if not self._sensitivities:
            raise StateError("there are no sensitivities; run calibration_mode() first")
        return save_sensitivities(path, self._sensitivities)

    def _take(
        self, found: dict[str, PalettizedWeight], biases: dict[str, Tensor], remarks: list[str]
    ) -> None:
        """Let the programs hold new palettes and biases."""
        annotated, prepared = self._ready()
        fitted = annotated.copy()
        for path, value in biases.items():
            holder, name = holder_of(fitted.graph_module, path)
            set_tensor(holder, name, value)
        self._fitted = fitted
        fake = fitted.copy().graph_module
        run_passes(fake, [FakePalettize(found)])
        for path in {**dict(prepared.named_parameters()), **found}:
            holder, name = holder_of(fake, path)
            target, name = holder_of(prepared, path)
            value = getattr(holder, name).detach()
            # dense palettes are the pass's own, everything else is shared with the program
            getattr(target, name).data = value if path in found else value.clone()
        table = fake.meta["graphopt.table"]
        self._palettes = found
        self._summary = CompressionTable(table.rows, (*table.warnings, *remarks))

    @property
    def algorithms(self) -> dict[str, str]:
        """Name of each weight to be palettized → what a calibration does for it."""
        return algorithms_of(self._ready()[0])

    def _ready(self) -> tuple[Program, CapturedModule]:
        if self._annotated is None or self._prepared is None:
            raise StateError("call prepare(example_inputs) first")
        return self._annotated, self._prepared

    def finalize(
        self,
        model: nn.Module | None = None,
        backend: ExportBackend | str = ExportBackend.CoreAI,
    ) -> CapturedModule:
        """Turn the palettes into indices, tables and lookup ops.

        Args:
            model: None, or what `prepare` returned (after training, or a trained copy of it).
            backend: Whose ops the module holds; `ExportBackend.Torch` keeps our neutral ones.

        Returns:
            A callable module, ready for `torch.export.export`.

        Raises:
            StateError: `prepare` was not called.
            LoweringError: The backend cannot hold a palette; the message says which and why.
        """
        return convert_for(self.program(model), backend)

    def program(self, model: nn.Module | None = None) -> CompressedProgram:
        """The compressed program in our neutral vocabulary.

        Args:
            model: None, or what `prepare` returned (after training, or a trained copy of it).

        Raises:
            InputError: `model` is something else.
            StateError: `prepare` was not called.
        """
        annotated, _ = self._ready()
        source, palettes = self._fitted or annotated, self._palettes
        if self._training is not None:
            source, palettes = self._training.fitted(model)
        converted = source.copy()
        run_passes(converted.graph_module, [PalettizeWeights(palettes)])
        return compressed(converted)

    def summary(self, backend: ExportBackend | str | None = None) -> CompressionTable:
        """One row per candidate tensor: what was done, or why not.

        Args:
            backend: Count sizes as this target stores them (Core AI keeps 3-bit codes as 4-bit
                ones); None counts the codes' own width.

        Raises:
            LoweringError: There is no such target.
            StateError: `prepare` was not called.
        """
        self._ready()
        if backend is not None:
            return as_stored(self.program(), backend)
        return self._summary if self._training is None else self.program().report()
