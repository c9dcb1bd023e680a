"""Quantizer: the compressor class of linear quantization, after training and in training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.export import ExportedProgram

from graphopt.backends import load_backend
from graphopt.backends.lowering import as_program, convert_for
from graphopt.capture import capture
from graphopt.compressors.compressed_program import CompressedProgram, compressed
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.quantization import QATSchedule, QuantizerConfig
from graphopt.errors import ConfigError, InputError, StateError
from graphopt.ir.captured_module import CapturedModule, holder_of
from graphopt.ir.program import Program
from graphopt.ir.records import CompressionTable, merged
from graphopt.passes import (
    AnnotatePalettization,
    AnnotateQuantization,
    ConvertQuantization,
    FoldBatchNorm,
    PalettizeWeights,
    RemoveUnused,
)
from graphopt.passes.calibrate_activations import (
    calibrate,
    observing,
    with_quantizers,
)
from graphopt.passes.pass_base import Pass
from graphopt.passes.pass_manager import run_passes
from graphopt.prepared import ActivationQuantizer, WeightQuantizer
from graphopt.prepared.conversion import activation_records, scales_of
from graphopt.prepared.state import parts_of, take_state
from graphopt.report.stored import as_stored
from graphopt.specs import ExportBackend

__all__ = ["Quantizer"]

_log = logging.getLogger(__name__)
_AnyQuantizer = ActivationQuantizer | WeightQuantizer


class Quantizer:
    """Quantize weights and activations, from data or in training.

    >>> quantizer = Quantizer(model, QuantizerConfig.presets.w8a8())
    >>> prepared = quantizer.prepare(example_inputs)
    >>> with quantizer.calibration_mode():
    ...     for batch in batches:
    ...         prepared(batch)
    >>> finalized = quantizer.finalize(backend=ExportBackend.CoreAI)

    Args:
        model: A module, an `ExportedProgram`, or a `Program`, palettized before or not; it is never
            changed.
        config: What becomes of which weight and activation; int8 everywhere by default.
        palettization: Weights to turn into tables in the same `prepare`, batch norms being folded
            before; `config` then holds for the activations and for the other weights.
    """

    compresses: ClassVar[str] = "weights and activations"

    def __init__(
        self,
        model: nn.Module | ExportedProgram | Program,
        config: QuantizerConfig | None = None,
        *,
        palettization: KMeansPalettizerConfig | None = None,
    ) -> None:
        if not isinstance(model, nn.Module | ExportedProgram | Program):
            raise InputError(
                f"model must be a module, an ExportedProgram or a Program, got {type(model).__name__}"
            )
        self._model = model
        self._config = QuantizerConfig() if config is None else config
        if self._config.kv_cache_quant_configs:
            raise ConfigError(
                "kv_cache_quant_configs: quantized key-value caches are not there yet; leave it out"
            )
        self._palettization = palettization
        self._annotated: Program | None = None
        self._prepared: CapturedModule | None = None
        self._step = 0
        self._by_hand = False

    # --- life cycle -----------------------------------------------------------------------------
    def prepare(
        self,
        example_inputs: tuple[Any, ...] | Tensor | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        backend: ExportBackend | str | None = None,
        on_unmatched: Literal["error", "warn"] = "error",
        export_with_no_grad: bool = True,
        dynamic_shapes: Any = "auto",
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

        Returns:
            A module with the model's signature and state-dict names that computes with rounded
            weights, and with rounded activations once their ranges are known. It shares nothing
            with the model. Calibrate it or train it, then call `finalize`.

        Raises:
            CaptureError: The model cannot be exported.
            ConfigError: A config key matches nothing, or asks for what activations cannot have.
            CompressionError: A weight contains NaN or Inf.
            StateError: `prepare` was called before.
        """
        del export_with_no_grad
        if self._annotated is not None:
            raise StateError("prepare() was called before; make a new Quantizer")
        model = self._model
        if dynamic_shapes != "auto" and not isinstance(model, Program):
            model = capture(model, example_inputs, example_kwargs, dynamic_shapes)
            example_inputs = example_kwargs = None
        annotated = as_program(model, example_inputs, example_kwargs)
        fused = None if backend is None else load_backend(backend).capabilities.fused_activations
        tables: list[Pass] = []
        if self._palettization is not None:
            tables = [
                FoldBatchNorm(),
                RemoveUnused(),
                AnnotatePalettization(self._palettization, on_unmatched),
                PalettizeWeights(),
            ]
        annotate = AnnotateQuantization(self._config, on_unmatched, fused)
        run_passes(annotated.graph_module, [*tables, annotate])
        prepared = with_quantizers(copy.deepcopy(annotated.graph_module))
        self._annotated, self._prepared = annotated, prepared
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
        evaluation mode and no autograd graph is built. Ranges hold from the end of the context.

        Args:
            model: Accepted for compatibility: None, or what `prepare` returned.

        Raises:
            StateError: `prepare` was not called.
        """
        del model
        with observing(self._ready()) as prepared:
            yield prepared

    def calibrate(self, data: Iterable[Any], *, progress: bool | None = None) -> CapturedModule:
        """Run the prepared module on `data` in `calibration_mode`.

        Args:
            data: Inputs of one call each: a tensor, a tuple or list of positional inputs, or a
                dictionary of keyword inputs; shapes may differ as far as the model allows.
            progress: Show a bar; None shows it on a terminal, if `data` has a length.

        Raises:
            StateError: `prepare` was not called.
            InputError: An input does not fit the captured graph.
        """
        prepared = self._ready()
        calibrate(prepared, data, progress)
        return prepared

    @contextmanager
    def training_mode(self, model: nn.Module | None = None) -> Iterator[CapturedModule]:
        """Train with rounding: dropout and batch norms behave as in training inside the context.

        Observers and rounding follow the `qat_schedule` of each module config, counted in calls of
        `step`; without one both are on.

        Args:
            model: Accepted for compatibility: None, or what `prepare` returned.

        Raises:
            StateError: `prepare` was not called.
        """
        del model
        prepared = self._ready()
        prepared.train()
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

    def enable_observer(self, module: str | None = None) -> None:
        """Let ranges follow the data, everywhere or in the module of that name.

        Schedules no longer count from then on.
        """
        self._set(module, observing=True)

    def disable_observer(self, module: str | None = None) -> None:
        """Keep ranges as they are."""
        self._set(module, observing=False)

    def enable_fake_quant(self, module: str | None = None) -> None:
        """Round, everywhere or in the module of that name."""
        self._set(module, rounding=True)

    def disable_fake_quant(self, module: str | None = None) -> None:
        """Do not round."""
        self._set(module, rounding=False)

    def _set(self, module: str | None, **flags: bool) -> None:
        self._by_hand = True
        chosen = [
            quantizer
            for quantizer in self._quantizers()
            if module is None
            or quantizer.origin.module == module
            or quantizer.origin.module.startswith(f"{module}.")
        ]
        if not chosen:
            known = sorted({quantizer.origin.module for quantizer in self._quantizers()})
            raise InputError(f"no quantizer belongs to module {module!r}; there are: {known}")
        for quantizer in chosen:
            for flag, value in flags.items():
                setattr(quantizer, flag, value)
            if isinstance(quantizer, WeightQuantizer):
                quantizer.forget()

    # --- results --------------------------------------------------------------------------------
    def finalize(
        self,
        model: nn.Module | None = None,
        backend: ExportBackend | str = ExportBackend.CoreAI,
        *,
        on_unobserved: Literal["error", "skip"] = "error",
    ) -> CapturedModule:
        """Turn quantizers into the quantize and dequantize ops of a backend.

        Args:
            model: None, or what `prepare` returned (or a trained copy of it).
            backend: Whose ops the module holds; `ExportBackend.Torch` keeps our neutral ones.
            on_unobserved: "skip" leaves activations without a usable range in float.

        Returns:
            A callable module, ready for `torch.export.export`.

        Raises:
            StateError: `prepare` was not called.
            CalibrationError: Activations were never observed, saw NaN or Inf, or have an empty range.
            LoweringError: The backend cannot hold the program.
        """
        return convert_for(self.program(model, on_unobserved=on_unobserved), backend)

    def program(
        self,
        model: nn.Module | None = None,
        *,
        on_unobserved: Literal["error", "skip"] = "error",
    ) -> CompressedProgram:
        """The quantized program in our neutral vocabulary.

        Raises:
            StateError: `prepare` was not called.
            CalibrationError: See `finalize`.
        """
        prepared = self._ready()
        if model is not None:
            if not isinstance(model, CapturedModule):
                raise InputError(f"model must come from prepare(), got {type(model).__name__}")
            prepared = model
        assert self._annotated is not None
        activations = scales_of(prepared, on_unobserved)
        converted = self._annotated.copy()
        gm = converted.graph_module
        take_state(gm, prepared)
        run_passes(gm, [FoldBatchNorm()])
        weights = {}
        for quantizer in parts_of(prepared, WeightQuantizer):
            holder, name = holder_of(gm, quantizer.origin.name)
            weights[quantizer.origin.name] = quantizer.quantized(getattr(holder, name))
        run_passes(gm, [ConvertQuantization(activations, weights), RemoveUnused()])
        records = tuple(activation_records(self._annotated.graph_module, prepared))
        known = gm.meta["graphopt.table"]
        gm.meta["graphopt.table"] = merged(known, CompressionTable((), (), records))
        return compressed(converted)

    def summary(self, backend: ExportBackend | str | None = None) -> CompressionTable:
        """One row per weight and one record per activation scale: what is done, or why not.

        Args:
            backend: Count sizes as this target stores them; None counts the codes' own width.

        Raises:
            LoweringError: There is no such target.
            StateError: `prepare` was not called.
        """
        self._ready()
        return as_stored(self.program(on_unobserved="skip"), backend)

    def _ready(self) -> CapturedModule:
        if self._prepared is None:
            raise StateError("call prepare(example_inputs) first")
        return self._prepared

    def _quantizers(self) -> list[_AnyQuantizer]:
        prepared = self._ready()
        return [*parts_of(prepared, ActivationQuantizer), *parts_of(prepared, WeightQuantizer)]
