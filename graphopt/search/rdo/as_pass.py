"""Rate-distortion optimisation as one pass of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from graphopt.backends.raising import RaiseToVocabulary
from graphopt.errors import InputError
from graphopt.ir.captured_module import callable_graph
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.passes.pass_base import Pass
from graphopt.run.batches import as_batch
from graphopt.search.rdo.config import RDOConfig
from graphopt.search.rdo.pipeline import optimize

__all__ = ["OptimizeRateDistortion"]


@dataclass(frozen=True)
class OptimizeRateDistortion(Pass):
    """Choose bits, fit and round every weight: `graphopt.rdo.optimize` on the graph.

    Attributes:
        data: Unlabelled inputs of one call each, as for `as_batch`.
        config: An `RDOConfig`, a mapping of its fields, or a YAML file.
        progress: Show bars; None shows them on a terminal.

    Examples:
        >>> config = {"target_bits": 9, "rounding": {"blocks": "none"}}
        >>> gm = program.graph_module
        >>> _ = graphopt.passes.RaiseToVocabulary()(gm)
        >>> OptimizeRateDistortion(batches, config)(gm).modified
        True
    """

    name: ClassVar[str] = "optimize-rate-distortion"
    after: ClassVar[tuple[type[Pass], ...]] = (RaiseToVocabulary,)
    tolerance: ClassVar[float | None] = None
    data: Sequence[Any]
    config: RDOConfig | Mapping[str, Any] | str | Path | None = None
    progress: bool | None = None

    @override
    def run(self, edit: Editor) -> None:
        gm = callable_graph(edit.gm)
        if not self.data:
            raise InputError("the optimisation needs calibration data")
        program = Program(gm, *as_batch(self.data[0]))
        done = optimize(program, None, self.data, self.config, progress=self.progress)
        edit.adopt(done.program.graph_module)
