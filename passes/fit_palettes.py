"""FitPalettes: the clustering and calibration of palettes as a pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from graphopt.errors import CalibrationError
from graphopt.fitting.algorithms import ALGORITHMS
from graphopt.fitting.calibration import (
    Calibrator,
    algorithms_of,
    needs_gradients,
    set_biases,
    shapes_to_weigh,
    without_data,
)
from graphopt.fitting.clustering import cluster_annotated
from graphopt.fitting.evidence import Resources
from graphopt.fitting.sensitivity import LossFn, load_sensitivities
from graphopt.ir.captured_module import callable_graph
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.ir.state import state_of
from graphopt.numerics.device import computing_on
from graphopt.passes.annotate_palettization import AnnotatePalettization
from graphopt.passes.pass_base import Pass
from graphopt.prepared.findings import findings_of, keep_findings
from graphopt.progress import track
from graphopt.run.batches import Batch, run_call
from graphopt.run.calibration_data import inputs_of_pairs, read_calls

__all__ = ["FitPalettes"]


@dataclass(frozen=True)
class FitPalettes(Pass):
    """Cluster annotated weights, from data where their specs' algorithms use any.

    The graph stays as it is, but for biases that take up the mean error of layers that were fitted
    to their outputs ("gptq"); `PalettizeWeights` uses the palettes. Forms that an earlier stage hands
    on stay.

    Attributes:
        data: Inputs of one call each, as for `as_batch`; with `loss_fn`, pairs (inputs, target).
            None clusters without data.
        loss_fn: `loss_fn(output, target)`, the mean over a batch; None takes a label-free loss.
        seed: Seed of whatever is drawn.
        progress: Show bars; None shows them on a terminal.
        sensitivity_path: File of `KMeansPalettizer.save_sensitivities`, by which errors are weighed
            where there are no data.
        calibrated_later: Cluster by k-means what has to wait for its data.
        resources: Where weights are clustered and fitted.
        mmap_dir: Folder that codes move to as soon as they are found without data.

    Raises:
        CalibrationError: An algorithm needs data and there are none.

    Examples:
        >>> from graphopt.palettization import KMeansPalettizerConfig
        >>> from graphopt.passes import AnnotatePalettization, PalettizeWeights
        >>> gm = program.graph_module
        >>> _ = AnnotatePalettization(KMeansPalettizerConfig())(gm)
        >>> _ = FitPalettes()(gm)
        >>> PalettizeWeights()(gm).modified
        True
    """

    name: ClassVar[str] = "fit-palettes"
    after: ClassVar[tuple[type[Pass], ...]] = (AnnotatePalettization,)
    tolerance: ClassVar[float | None] = None
    data: Sequence[Any] | None = None
    loss_fn: LossFn | None = None
    seed: int = 0
    progress: bool | None = None
    sensitivity_path: str | Path | None = None
    calibrated_later: bool = False
    resources: Resources = field(default_factory=Resources)
    mmap_dir: str | Path | None = None

    @override
    def run(self, edit: Editor) -> None:
        gm = callable_graph(edit.gm)
        annotated = Program(gm, ())
        known = findings_of(gm).stored
        if known and known.keys() >= algorithms_of(annotated).keys():
            return
        calibrator = Calibrator(annotated, loss_fn=self.loss_fn, seed=self.seed)
        if not self.data or not any(map(needs_gradients, calibrator.algorithms.values())):
            self._cluster(annotated)
            return
        module = calibrator.annotated.copy().graph_module
        labelled = self.loss_fn is not None
        inputs = inputs_of_pairs(self.data) if labelled else self.data
        # inside, the state does not move
        calls: Iterable[Batch] = read_calls(module, inputs)
        calls = calls if not state_of(module) else list(calls)
        targets = (sample[1] for sample in self.data) if labelled else itertools.repeat(None)
        with calibrator.watching(module):
            batches = track(calls, "gradients", len(inputs), enabled=self.progress)
            for batch, target in zip(batches, targets, strict=labelled):
                calibrator.step(run_call(module, batch), target)
        calibrator.vary(module, self.progress)
        fit = calibrator.palettes(
            self.seed, self.progress, correct_bias=True, resources=self.resources
        )
        set_biases(gm, fit.biases)
        edit.changed |= bool(fit.biases)
        fitted = all(ALGORITHMS[name].needs_inputs for name in calibrator.algorithms.values())
        keep_findings(gm, stored={**fit.weights, **known}, fitted_to_outputs=fitted)
        edit.record(remarks=fit.remarks)

    def _cluster(self, annotated: Program) -> None:
        """Without data; weighed by saved sensitivities where there are any."""
        gm, weighed = annotated.graph_module, {}
        if self.sensitivity_path is not None:
            weighed = load_sensitivities(self.sensitivity_path, shapes_to_weigh(annotated))
        waiting = [] if self.calibrated_later else without_data(gm, weighed)
        if waiting:
            raise CalibrationError(
                "there are no data for algorithms that need them:\n"
                + "\n".join(waiting)
                + "\ngive calibration data (`calibration_data=`, `data=` of a pipeline, --data), or"
                " set algorithm 'kmeans' or 'auto'"
            )
        with computing_on(self.resources.device):
            palettes = cluster_annotated(
                gm,
                progress=self.progress,
                seed=self.seed,
                importance=weighed,
                executor=self.resources.executor,
                folder=None if self.mmap_dir is None else Path(self.mmap_dir),
            )
        stored = {**palettes, **findings_of(gm).stored}
        keep_findings(gm, stored=stored, sensitivities=weighed, fitted_to_outputs=False)
