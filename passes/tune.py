"""Tune tables, ranges, biases and norms of a compressed program to reproduce the uncompressed one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from typing_extensions import Unpack, override

from graphopt.errors import CalibrationError
from graphopt.fitting.tuning import TuningKeywords, TuningOptions, tune_graph
from graphopt.ir import op_info
from graphopt.ir.annotations import record
from graphopt.ir.captured_module import callable_graph
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.numerics.device import device_of, lacks
from graphopt.passes.correct_statistics import KeepReference, reference_of
from graphopt.passes.fold_batchnorm import FoldBatchNorm
from graphopt.passes.pass_base import Pass
from graphopt.passes.pass_manager import run_passes
from graphopt.run.calibration_data import read_calls

__all__ = ["Tune", "tune"]

_log = logging.getLogger(__name__)
ProgramT = TypeVar("ProgramT", bound=Program)


@dataclass(frozen=True)
class Tune(Pass):
    """`tune` as a pass: table entries, ranges of activations, biases and norms move, codes stay.

    Attributes:
        data: Inputs of one call each, as for `as_batch`.
        steps: Steps per block.
        seed: Seed of the order of the data.
        progress: Show a bar; None shows it on a terminal.
        held_out: Inputs that decide which step was best; without any, some of `data` do.
        device: Torch device that every pass of it runs on; None is where the tensors are.

    Examples:
        >>> from graphopt.palettization import KMeansPalettizerConfig
        >>> from graphopt.passes import AnnotatePalettization, KeepReference, PalettizeWeights
        >>> gm = program.graph_module
        >>> annotate = AnnotatePalettization(KMeansPalettizerConfig())
        >>> for step in (KeepReference(), annotate, PalettizeWeights()):
        ...     _ = step(gm)
        >>> Tune(batches, steps=5)(gm).modified
        True
    """

    name: ClassVar[str] = "tune"
    after: ClassVar[tuple[type[Pass], ...]] = (KeepReference,)
    tolerance: ClassVar[float | None] = None
    data: Sequence[Any]
    steps: int = 200
    seed: int = 0
    progress: bool | None = None
    held_out: Sequence[Any] = ()
    device: str | None = None

    @override
    def run(self, edit: Editor) -> None:
        gm = callable_graph(edit.gm)
        programs = (Program(gm, ()), Program(reference_of(edit.gm), ()))
        options: TuningKeywords = {
            "steps": self.steps,
            "seed": self.seed,
            "progress": self.progress,
            "device": self.device,
        }
        tuned = tune(*programs, self.data, self.held_out, **options)
        edit.adopt(tuned.graph_module)


def tune(
    program: ProgramT,
    reference: Program,
    data: Sequence[Any],
    held_out: Sequence[Any] = (),
    **options: Unpack[TuningKeywords],
) -> ProgramT:
    """Tune a compressed program on unlabelled data.

    Args:
        program: What a compressor made of `reference`; it is not changed.
        reference: The uncompressed program.
        data: Inputs of one call each, as for `as_batch`: one step of Adam takes one of them.
        held_out: Others, to which nothing was fitted: the step with the least error on them counts.
            Without any, one in eight of `data` is left out of the steps; where weights were fitted to
            these, too, their errors are too small to be fallen below, and little will move.
        **options: The fields of `TuningOptions`, which documents them.

    Returns:
        A program with the same codes and ops: table entries, biases, norms, constants of migrated
        scales, and scales and zero points of activations have moved, but no range that a config
        fixes and no scale that is found at run time. A block whose error did not fall stays as it is.

    Raises:
        OptionError: There is no such option.
        CalibrationError: There is no data.
        InputError: Data do not fit the program.

    Examples:
        >>> tuned = tune(compressed, program, batches, steps=5)
        >>> type(tuned).__name__
        'CompressedProgram'
    """
    how = TuningOptions.of("tune", options)
    tuned = replace(program, graph_module=copy.deepcopy(program.graph_module))
    if how.steps < 1:
        return tuned
    if not data:
        raise CalibrationError("no data: there is nothing to tune on")
    gm, exact = tuned.graph_module, reference.graph_module
    device = device_of(how.device)
    batches, held = (list(read_calls(gm, calls)) for calls in (data, held_out))
    # the program's convolutions may stand for the norms behind them, too
    norms = [len(list(Editor(graph).calls(op_info.BATCH_NORM))) for graph in (gm, exact)]
    if device is not None or norms[0] < norms[1]:
        exact = reference.copy().graph_module
    if norms[0] < norms[1]:
        run_passes(exact, [FoldBatchNorm()])
    try:
        tune_graph(gm, exact, batches, how, held_out=held)
    except (NotImplementedError, TypeError) as error:
        if device is None or not lacks(device, error):
            raise
        why = f"{how.device} cannot tune it ({_first_line(error)}); tuned where its tensors are"
        _log.warning(why)
        here = replace(how, device=None)
        tuned = replace(program, graph_module=copy.deepcopy(program.graph_module))
        tune_graph(tuned.graph_module, exact, batches, here, held_out=held)
        record(tuned.graph_module, remarks=[why])
    return tuned


def _first_line(error: Exception) -> str:
    return (
        str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else "no reason given"
    )
