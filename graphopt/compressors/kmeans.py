"""KMeansPalettizer: the compressor class of palettization, without data or calibrated."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from torch import Tensor, nn
from torch.export import ExportedProgram
from typing_extensions import Unpack, override

from graphopt.compressors.base import Compressor
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.compressors.flow import joint_pipeline
from graphopt.compressors.options import CalibrationKeywords, CompressOptions
from graphopt.compressors.training import PaletteTraining
from graphopt.config.joint import JointConfig, only_part
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.errors import StateError
from graphopt.extras import deferred
from graphopt.fitting.calibration import (
    Calibrator,
    algorithms_of,
    set_biases,
    without_data,
)
from graphopt.fitting.evidence import Resources
from graphopt.fitting.sensitivity import LossFn, save_sensitivities
from graphopt.ir.annotations import record
from graphopt.ir.captured_module import CapturedModule, holder_of
from graphopt.ir.program import Program
from graphopt.passes import FakePalettize, LoadState
from graphopt.passes.fit_palettes import FitPalettes
from graphopt.passes.pass_manager import run_passes
from graphopt.prepared import QUANTIZERS
from graphopt.prepared.findings import findings_of, keep_findings
from graphopt.progress import track
from graphopt.run.batches import Batch, CallSequence, run_call
from graphopt.run.calibration_data import read_calls
from graphopt.schemes.palettize import PalettizedWeight
from graphopt.specs import DKMTrainingSpec

if TYPE_CHECKING:
    from graphopt.report import table as tables
else:
    tables = deferred("graphopt.report.table")

__all__ = ["KMeansPalettizer"]

_log = logging.getLogger(__name__)


class KMeansPalettizer(Compressor):
    """Replace weights by tables of centroids and indices.

    >>> palettizer = KMeansPalettizer(model)
    >>> prepared = palettizer.prepare(example)  # computes with the palettes
    >>> with palettizer.calibration_mode(loss_fn=torch.nn.functional.cross_entropy) as skm:  # optional
    ...     for x in batches:
    ...         _ = skm.step(prepared(x), model(x).argmax(1))
    >>> finalized = palettizer.finalize(backend=graphopt.ExportBackend.Torch)

    Args:
        model: A module, an `ExportedProgram`, or a `Program`; it is never changed.
        config: What becomes of which weight; 4 bits per tensor everywhere by default. What
            `Recipe.to_config` gives is one, where it asks for tables alone.
    """

    compresses: ClassVar[str] = "weights"

    _strategy: ClassVar[DKMTrainingSpec | None] = None

    def __init__(
        self,
        model: nn.Module | ExportedProgram | Program,
        config: KMeansPalettizerConfig | JointConfig | None = None,
    ) -> None:
        super().__init__(model)
        own, self._artifact = only_part(config, KMeansPalettizerConfig)
        self._config = KMeansPalettizerConfig() if own is None else own
        self._fitted: Program | None = None
        self._sensitivities: dict[str, Tensor] = {}
        self._training: PaletteTraining | None = None
        self._seed = 0
        self._palettes: dict[str, PalettizedWeight] = {}
        self._cache_dense = False
        self._resources = Resources()

    @override
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
        executor: Any = None,
        device: str | None = None,
        progress: bool | None = None,
        seed: int = 0,
        state_dict: Mapping[str, Tensor] | None = None,
        cache_dense: bool = False,
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
            num_workers: Accepted for compatibility; clustering uses torch's threads, or `executor`.
            executor: Where weights are clustered and calibrated, as in `CompressOptions`.
            device: Torch device of that, and of soft palettes in training; see `CompressOptions`.
            progress: Show a bar; None shows it on a terminal.
            seed: Seed of vector tables.
            state_dict: State dict of a model that was prepared with the same config: its weights,
                which hold few values each, give the tables back; errors are counted from them. With
                `enable_per_channel_scale` they come back nearly, within a hundredth of the outputs'
                peak: the names are those of the model, so that the state holds products of entries
                and scales alone, and the largest of a row, which scales it, is not the weight's any
                more. To go on exactly, keep the program (`program().save`), not the state.
            cache_dense: Let the module hold the palettized weights decoded: calls run at the model's
                speed, for as much memory as the model's weights take. Otherwise it holds codes and
                tables, each call decodes a weight where it is read, and torch.export takes it only
                with `strict=False`.

        Returns:
            A module with the model's signature and state-dict names that computes with the
            palettized weights. It shares nothing with the model.

        Raises:
            CaptureError: The model cannot be exported.
            ConfigError: A config key matches nothing.
            CompressionError: A weight contains NaN or Inf.
            InputError: `sensitivity_path` cannot be read or belongs to another model, or
                `state_dict` does not fit.
            StateError: `prepare` was called before.
        """
        self._refuse_second_prepare()
        if num_workers != 1:
            _log.info("num_workers has no effect: clustering uses torch's threads, or `executor`")
        how = CompressOptions(
            on_unmatched=on_unmatched,
            fold_batch_norm=fold_batch_norm,
            correct_statistics=False,
            seed=seed,
            progress=progress,
            executor=executor,
            device=device,
        )
        resources = how.resources
        cluster = FitPalettes(
            seed=seed,
            progress=progress,
            sensitivity_path=sensitivity_path,
            calibrated_later=True,
            resources=resources,
        )
        joint = JointConfig(palettization=self._config, artifact=self._artifact)
        pipeline = joint_pipeline("palettize", joint, options=how).replace(cluster.name, cluster)
        if state_dict is not None:
            pipeline = pipeline.insert_before("annotate-palettization", LoadState(state_dict))
        run = self._pause(
            pipeline, "palettize-weights", example_inputs, example_kwargs, dynamic_shapes
        )
        gm = run.program.graph_module
        findings = findings_of(gm)
        self._palettes = cast("dict[str, PalettizedWeight]", dict(findings.stored))
        self._sensitivities = dict(findings.sensitivities)
        keep_findings(gm, stored={}, sensitivities={})
        fake = run.program.copy().graph_module
        run_passes(fake, [FakePalettize(self._palettes, cache_dense)])
        _say(tables.table_of(Program(fake, ())))
        self._run, self._seed, self._cache_dense = run, seed, cache_dense
        self._resources = resources
        self._prepared = copy.deepcopy(fake)
        if state_dict is not None and any(name.startswith(f"{QUANTIZERS}.") for name in state_dict):
            self._load(self._train().prepared, state_dict)
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
        at the exit. What is done depends on the spec's `algorithm`: "skm" weighs squared errors by
        the mean squared gradient of a sample's loss (Kim et al., SqueezeLLM, arXiv 2306.07629,
        equation 3), "gptq" fits the outputs layer by layer, "auto" is "gptq" where it can be, and
        "kmeans" stays as it is.
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
        prepared = self._ready()
        calibrator = Calibrator(
            self._waiting().program,
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
        calibrator.vary(prepared, progress)
        fitted = calibrator.palettes(
            self._seed, progress, correct_bias=correct_bias, resources=self._resources
        )
        self._sensitivities = calibrator.collector.sums
        self._take(fitted.weights, fitted.biases, fitted.remarks)
        if sensitivity_path is not None:
            self.save_sensitivities(sensitivity_path)

    def calibrate(
        self,
        data: Iterable[Any],
        *,
        progress: bool | None = None,
        **options: Unpack[CalibrationKeywords],
    ) -> CapturedModule:
        """Run `data`, inputs of one call each, through `calibration_mode` without labels.

        Args:
            data: Each a tensor, a tuple or list of positional inputs, or a dict of keyword inputs.
            progress: Show bars; None shows them on a terminal.
            options: Further options of `calibration_mode`.
        """
        prepared = self._ready()
        total = len(data) if isinstance(data, Sized) else 0
        calls: Iterable[Batch] = read_calls(prepared, data)
        if isinstance(data, Sequence) and any(isinstance(each, CallSequence) for each in data):
            # inside, the state does not move
            calls = list(calls)
        with self.calibration_mode(progress=progress, **options) as calibrator:
            for batch in track(calls, "gradients", total, enabled=progress):
                calibrator.step(run_call(prepared, batch))
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
            StateError: `prepare` was not called, or the model drops something in training for which
                the graph has no place.
        """
        del model
        training = self._train()
        self._start_training()
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
        source = self._fitted or self._waiting().program
        if self._training is None:
            parts = (self._ready(), self._palettes, self._config, self._strategy)
            self._training = PaletteTraining(source, *parts, self._resources.device)
        return self._training

    def save_sensitivities(self, path: str | Path) -> Path:
        """Write the sensitivities of the last calibration as safetensors.

        Raises:
            StateError: There was no calibration that collected any.
        """
        if not self._sensitivities:
            raise StateError(
                "there are no sensitivities: run calibration_mode() for algorithm 'skm', or give it"
                " a sensitivity_path"
            )
        return save_sensitivities(path, self._sensitivities)

    def _take(
        self, palettes: dict[str, PalettizedWeight], biases: dict[str, Tensor], remarks: list[str]
    ) -> None:
        """Let the programs hold new palettes and biases."""
        prepared = self._ready()
        fitted = self._waiting().program.copy()
        set_biases(fitted.graph_module, biases)
        record(fitted.graph_module, remarks=remarks)
        self._fitted = fitted
        fake = fitted.copy().graph_module
        run_passes(fake, [FakePalettize(palettes, self._cache_dense)])
        for path in {**dict(prepared.named_parameters()), **palettes}:
            holder, name = holder_of(fake, path)
            target, name = holder_of(prepared, path)
            value = getattr(holder, name).detach()
            # dense palettes are the pass's own, everything else is shared with the program
            getattr(target, name).data = value if path in palettes else value.clone()
        self._palettes = palettes

    @property
    def algorithms(self) -> dict[str, str]:
        """Name of each weight to be palettized → what a calibration does for it."""
        return algorithms_of(self._waiting().program)

    @override
    def program(self, model: nn.Module | None = None) -> CompressedProgram:
        """The compressed program in our neutral vocabulary.

        Args:
            model: None, or what `prepare` returned (after training, or a trained copy of it).

        Raises:
            InputError: `model` is something else.
            StateError: `prepare` was not called.
        """
        run = self._waiting()
        if self._training is not None:
            source, palettes = self._training.fitted(model)
            return run.finish(source, stored=palettes)
        self._from_prepare(model, None)
        if self._fitted is not None:
            return run.finish(self._fitted.copy(), stored=self._palettes)
        source = run.program.copy()
        waiting = without_data(source.graph_module, self._sensitivities)
        record(
            source.graph_module,
            remarks=[f"{name} had no data; clustered by k-means" for name in waiting],
        )
        return run.finish(source, stored=self._palettes)


def _say(table: tables.CompressionTable) -> None:
    """Log what is palettized and what is not."""
    _log.info(
        "palettized %d of %d tensors: %.3f bits per weight, %.3f over the palettized",
        len(table.palettized),
        len(table),
        table.overall_bits_per_weight,
        table.bits_per_weight,
    )
    for row in table.skipped:
        _log.info("left %s as it is: %s", row.name, row.detail)
