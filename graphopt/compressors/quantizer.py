"""Quantizer: the compressor class of linear quantization, after training and in training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn
from torch.export import ExportedProgram
from typing_extensions import override

from graphopt.backends.lowering import as_program
from graphopt.backends.registry import DEFAULT, ExportBackend
from graphopt.compressors.base import Compressor
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.compressors.finalized import Weights, finalized
from graphopt.compressors.fitted_integers import fit_prepared
from graphopt.compressors.flow import joint_pipeline
from graphopt.compressors.migration import Calls, migrate_prepared
from graphopt.compressors.options import CompressOptions
from graphopt.compressors.switches import AnyQuantizer, Switches
from graphopt.compressors.tuned import finished_with_tuning
from graphopt.config.joint import JointConfig, only_part
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.quantization import QATSchedule, QuantizerConfig
from graphopt.errors import InputError
from graphopt.extras import deferred
from graphopt.fitting.sensitivity import LossFn
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.program import Program
from graphopt.passes.calibrate_activations import (
    CalibrateActivations,
    calibrate,
    observing,
    with_quantizers,
)
from graphopt.prepared import ActivationQuantizer, WeightQuantizer
from graphopt.prepared.state import parts_of, take_state
from graphopt.run.calibration_data import data_list

if TYPE_CHECKING:
    from graphopt.report import stored
    from graphopt.report.table import CompressionTable
else:
    stored = deferred("graphopt.report.stored")

__all__ = ["Quantizer"]

_log = logging.getLogger(__name__)


class Quantizer(Switches, Compressor):
    """Quantize weights and activations, from data or in training.

    >>> quantizer = Quantizer(model)
    >>> prepared = quantizer.prepare(example)
    >>> with quantizer.calibration_mode():
    ...     for batch in batches:
    ...         _ = prepared(batch)
    >>> finalized = quantizer.finalize(backend=graphopt.ExportBackend.Torch)

    Args:
        model: A module, an `ExportedProgram`, or a `Program`, palettized before or not; it is never
            changed.
        config: What becomes of which weight and activation; int8 everywhere by default. What
            `Recipe.to_config` gives is one, where it asks for integers alone.
        palettization: Weights to turn into tables in the same `prepare`, batch norms being folded
            before; `config` then holds for the activations and for the other weights.
    """

    compresses: ClassVar[str] = "weights and activations"

    def __init__(
        self,
        model: nn.Module | ExportedProgram | Program,
        config: QuantizerConfig | JointConfig | None = None,
        *,
        palettization: KMeansPalettizerConfig | None = None,
    ) -> None:
        super().__init__(model)
        own, self._artifact = only_part(config, QuantizerConfig)
        self._config = QuantizerConfig() if own is None else own
        self._palettization = palettization
        self._step = 0
        self._calls: Sequence[Any] = ()

    # --- life cycle -----------------------------------------------------------------------------
    @override
    def prepare(
        self,
        example_inputs: tuple[Any, ...] | Tensor | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        backend: ExportBackend | str | None = None,
        on_unmatched: Literal["error", "warn"] = "error",
        export_with_no_grad: bool = True,
        dynamic_shapes: Any = "auto",
        calibration_data: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> CapturedModule:
        """Capture the model and insert quantizers.

        Args:
            example_inputs: Inputs of one call; they only give shapes, not ranges.
            example_kwargs: Keyword inputs of that call.
            backend: Target whose fusions decide where activations are rounded: one that does not
                compute an activation function together with the op before it has a rounding between
                them. None rounds behind the function everywhere.
            on_unmatched: Whether a config key that matches no module, op or state raises or warns.
            export_with_no_grad: Accepted for compatibility; capture needs no gradients.
            dynamic_shapes: As for `graphopt.capture`, where the model is no program yet.
            calibration_data: Inputs of one call each, by which the tables of `palettization` are
                fitted (pairs with `loss_fn`); its algorithms "skm" and "gptq" need them. Activations
                are calibrated afterwards.
            loss_fn: `loss_fn(output, target)` of that fitting; None needs no labels.
            state_dict: State dict of a model that was prepared with the same config: weights, scales
                and statistics are taken from it, and activations with known ranges are rounded.
                What a calibration has fitted by error feedback comes with it.

        Returns:
            A module with the model's signature and state-dict names that computes with rounded
            weights, and with rounded activations once their ranges are known. It shares nothing
            with the model. Calibrate it or train it, then call `finalize`.

        Raises:
            CaptureError: The model cannot be exported.
            ConfigError: A config key matches nothing, or asks for what activations cannot have.
            CompressionError: A weight contains NaN or Inf.
            InputError: There are calibration data and no `palettization`, or `state_dict` does not
                fit.
            CalibrationError: An algorithm of `palettization` needs data and there are none.
            StateError: `prepare` was called before.
        """
        del export_with_no_grad
        self._refuse_second_prepare()
        if calibration_data is not None and self._palettization is None:
            raise InputError(
                "calibration_data fits the tables of `palettization`, and there is none; activations"
                " are calibrated by calibrate() or calibration_mode()"
            )
        joint = JointConfig(
            palettization=self._palettization,
            quantization=self._config,
            artifact=self._artifact,
        )
        how = CompressOptions(
            backend=backend,
            correct_statistics=False,
            on_unmatched=on_unmatched,
            fold_batch_norm=self._palettization is not None,
        )
        pipeline = joint_pipeline("quantize", joint, calibration_data, loss_fn, how)
        run = self._pause(
            pipeline, "calibrate-activations", example_inputs, example_kwargs, dynamic_shapes
        )
        prepared = with_quantizers(copy.deepcopy(run.program.graph_module))
        if state_dict is not None:
            self._load(prepared, state_dict)
            for quantizer in parts_of(prepared, ActivationQuantizer):
                quantizer.rounding = bool(quantizer.known)
        self._run, self._prepared = run, prepared
        _log.info(
            "%d weights and %d activation scales to quantize",
            len(parts_of(prepared, WeightQuantizer)),
            len(parts_of(prepared, ActivationQuantizer)),
        )
        return prepared

    @contextmanager
    def calibration_mode(self, model: nn.Module | None = None) -> Iterator[CapturedModule]:
        """Observe the activations of every call inside the context.

        Statistics start empty. Weights are rounded and activations are not, the module is in
        evaluation mode and no autograd graph is built. Ranges hold from the end of the context, where
        scales migrate (`QuantizerConfig.migrate_scales`), the calls are observed once more, and
        weights are fitted by them (`QuantizationSpec.algorithm`).

        Args:
            model: Accepted for compatibility: None, or what `prepare` returned.

        Raises:
            StateError: `prepare` was not called.
        """
        del model
        prepared = self._ready()
        calls = Calls(prepared)
        watch = prepared.register_forward_pre_hook(
            lambda _, args, kwargs: calls.take(args, kwargs), with_kwargs=True
        )
        try:
            with observing(prepared):
                yield prepared
        finally:
            watch.remove()
        self._calls = calls.inputs
        if self._migrate(calls.inputs):
            calibrate(prepared, calls.inputs, progress=False)
        self._fit(calls.inputs, progress=False)

    @property
    def _has_trained(self) -> bool:
        return self._trains_as_model or self._step > 0

    def _fit(self, data: Sequence[Any], progress: bool | None) -> None:
        """Find the elements of weights by error feedback, before any training."""
        if data and not self._has_trained:
            fit_prepared(self._waiting(), self._ready(), data, progress)

    def _migrate(self, data: Sequence[Any]) -> bool:
        """Move ranges of channels into weights, before any training."""
        if not data or self._has_trained or not self._config.migrate_scales:
            return False
        moved = migrate_prepared(self._waiting(), self._ready(), data)
        if moved is not None:
            self._run = moved
        return moved is not None

    def calibrate(self, data: Iterable[Any], *, progress: bool | None = None) -> CapturedModule:
        """Run the prepared module on `data` in `calibration_mode`, one call after the other.

        Args:
            data: Inputs of one call each: a tensor, a tuple or list of positional inputs, or a
                dictionary of keyword inputs; shapes may differ as far as the model allows.
            progress: Show a bar; None shows it on a terminal, if `data` has a length.

        Raises:
            StateError: `prepare` was not called.
            InputError: An input does not fit the captured graph.
        """
        prepared = self._ready()
        given = data_list(data)
        self._calls = given or ()
        self._migrate(given or ())
        calibrate(prepared, given or (), progress)
        self._fit(given or (), progress)
        return prepared

    @contextmanager
    def training_mode(self, model: nn.Module | None = None) -> Iterator[CapturedModule]:
        """Train with rounding: dropout and batch norms behave as in training inside the context.

        Observers and rounding follow the `qat_schedule` of each module config, counted in calls of
        `step`; without one both are on.

        Args:
            model: Accepted for compatibility: None, or what `prepare` returned.

        Raises:
            StateError: `prepare` was not called, or the model drops something in training for which
                the graph has no place.
        """
        del model
        prepared = self._start_training()
        if not self._by_hand:
            self._follow_schedule()
        try:
            yield prepared
        finally:
            prepared.eval()
            for quantizer in parts_of(prepared, ActivationQuantizer):
                if quantizer.observing and not quantizer.learned:
                    quantizer.settle()
                quantizer.observing = False
            if not self._by_hand:
                # a schedule that did not get there must not hide what finalize will do
                for quantizer in self._quantizers():
                    quantizer.rounding = True

    def step(self) -> None:
        """Count a training step for the schedules.

        Raises:
            StateError: `prepare` was not called.
        """
        self._ready()
        self._step += 1
        if not self._by_hand:
            self._follow_schedule()

    def _follow_schedule(self) -> None:
        for quantizer in self._quantizers():
            schedule = self._schedule(quantizer.origin.path)
            off = schedule.disable_observer
            quantizer.observing = self._step >= schedule.enable_observer and (
                off is None or self._step < off
            )
            quantizer.rounding = self._step >= schedule.enable_fake_quant
            if isinstance(quantizer, WeightQuantizer):
                quantizer.forget()

    def _schedule(self, path: str) -> QATSchedule:
        return self._config.schedule_at(path, "qat_schedule") or QATSchedule()

    # --- results --------------------------------------------------------------------------------
    @override
    def finalize(
        self,
        model: nn.Module | None = None,
        backend: ExportBackend | str = DEFAULT,
        *,
        weights: Weights = "stored",
        mmap_dir: str | Path | None = None,
        on_unobserved: Literal["error", "skip"] = "error",
        tune_steps: int = 0,
        device: str | None = None,
    ) -> CapturedModule:
        """Turn quantizers into the quantize and dequantize ops of a backend.

        Args:
            model: None, or what `prepare` returned (or a trained copy of it).
            backend: Whose ops the module holds; `ExportBackend.Torch` keeps our neutral ones.
            weights: As in `Compressor.finalize`.
            mmap_dir: As in `Compressor.finalize`.
            on_unobserved: "skip" leaves activations without a usable range in float.
            tune_steps: Steps of `graphopt.tune` on the calls of the last calibration, one in eight of
                which is held out from then on; 0 leaves it out.
            device: Where that tuning runs, as in `CompressOptions`.

        Returns:
            A callable module, ready for `torch.export.export`.

        Raises:
            StateError: `prepare` was not called.
            CalibrationError: Activations were never observed, saw NaN or Inf, or have an empty range;
                or there was no calibration to tune on.
            InputError: There are steps of tuning behind a training.
            LoweringError: The backend cannot hold the program.
        """
        program = self.program(
            model, on_unobserved=on_unobserved, tune_steps=tune_steps, device=device
        )
        return finalized(program, backend, weights, mmap_dir)

    @override
    def program(
        self,
        model: nn.Module | None = None,
        *,
        on_unobserved: Literal["error", "skip"] = "error",
        tune_steps: int = 0,
        device: str | None = None,
    ) -> CompressedProgram:
        """The quantized program in our neutral vocabulary.

        Args:
            model: See `finalize`.
            on_unobserved: See `finalize`.
            tune_steps: See `finalize`.
            device: See `finalize`.

        Raises:
            StateError: `prepare` was not called.
            CalibrationError: See `finalize`.
            InputError: See `finalize`.
        """
        run, prepared = self._waiting(), self._from_prepare(model, None)
        if tune_steps > 0:
            if self._has_trained or prepared is not self._prepared:
                raise InputError(
                    f"tune_steps={tune_steps} would take the model back to before its training"
                )
            captured = run.program
            exact = as_program(self._model, captured.example_args, captured.example_kwargs)
            how = CompressOptions(on_unobserved=on_unobserved, tune_steps=tune_steps, device=device)
            return finished_with_tuning(run, exact, self._config, self._calls, how)
        source = run.program.copy()
        take_state(source.graph_module, prepared)
        observed = CalibrateActivations(on_unobserved=on_unobserved)
        return run.finish(source, observed, prepared=prepared)

    @override
    def summary(self, backend: ExportBackend | str | None = None) -> CompressionTable:
        """One row per weight and one record per activation scale: what is done, or why not.

        Args:
            backend: Count sizes as this target stores them; None counts the codes' own width.

        Raises:
            LoweringError: There is no such target.
            StateError: `prepare` was not called.
        """
        return stored.as_stored(self.program(on_unobserved="skip"), backend)

    @override
    def _quantizers(self) -> list[AnyQuantizer]:
        prepared = self._ready()
        return [*parts_of(prepared, ActivationQuantizer), *parts_of(prepared, WeightQuantizer)]
