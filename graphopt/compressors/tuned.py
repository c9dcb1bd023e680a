"""A quantizer's run, finished with tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from graphopt.compressors.calls import CalibrationCalls
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.compressors.flow import after_annotation
from graphopt.compressors.options import CompressOptions
from graphopt.compressors.pipeline import PausedRun
from graphopt.config.quantization import QuantizerConfig
from graphopt.fitting.tuning import TuningKeywords
from graphopt.ir.program import Program
from graphopt.passes import RemoveUnused
from graphopt.passes.tune import tune

__all__ = ["finished_with_tuning"]


def finished_with_tuning(
    run: PausedRun,
    model: Program,
    config: QuantizerConfig,
    calls: Sequence[Any],
    how: CompressOptions,
) -> CompressedProgram:
    """Calibrate, fit and convert anew, and tune on a part of the calls with the others held out.

    Args:
        run: The run that waits for its calibration.
        model: What its outputs are to be.
        config: What becomes of what.
        calls: Those of the calibration.
        how: Steps of tuning, seed, bars and device.

    Raises:
        CalibrationError: There was no calibration.
    """
    parts = CalibrationCalls.of(calls, how)
    passes = (*after_annotation(config, parts, how), RemoveUnused(keep_tied=True))
    done = run.pipeline.passes[: run.place]
    waiting = replace(run, pipeline=replace(run.pipeline, passes=(*done, *passes)))
    options: TuningKeywords = {
        "steps": how.tune_steps,
        "seed": how.seed,
        "progress": how.progress,
        "device": how.device,
    }
    return tune(waiting.finish(), model, parts.learned, parts.held_out, **options)
