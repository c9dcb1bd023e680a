"""Let batch norms and biases take up what compression shifted, against the graph kept before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx
from typing_extensions import override

from graphopt.errors import InputError
from graphopt.ir.captured_module import CapturedModule, callable_graph
from graphopt.ir.editor import Editor
from graphopt.ir.program import share_graph
from graphopt.passes.correct_bias import CorrectBias
from graphopt.passes.pass_base import Pass
from graphopt.passes.reestimate_batchnorm import ReestimateBatchNorm
from graphopt.prepared.findings import findings_of, keep_findings

__all__ = ["CorrectStatistics", "ForgetReference", "KeepReference", "reference_of"]


@dataclass(frozen=True)
class KeepReference(Pass):
    """Remember the graph as it is, for passes that compare with it; tensors are shared.

    The graph does not change.

    Examples:
        >>> from graphopt.passes import reference_of
        >>> gm = program.graph_module
        >>> KeepReference()(gm).modified
        False
        >>> torch.equal(reference_of(gm)(*example), model(*example))
        True
    """

    name: ClassVar[str] = "keep-reference"

    @override
    def run(self, edit: Editor) -> None:
        kept = share_graph(edit.gm)
        kept.meta = {}
        keep_findings(edit.gm, reference=kept)


@dataclass(frozen=True)
class ForgetReference(Pass):
    """Let go of the graph that `KeepReference` kept, and of its tensors; the graph stays as it is.

    Examples:
        >>> from graphopt.passes import KeepReference, reference_of
        >>> gm = program.graph_module
        >>> _ = KeepReference()(gm), ForgetReference()(gm)
        >>> try:
        ...     reference_of(gm)
        ... except graphopt.errors.InputError as error:
        ...     print(error)
        KeepReference has kept no graph to compare with
    """

    name: ClassVar[str] = "forget-reference"

    @override
    def run(self, edit: Editor) -> None:
        keep_findings(edit.gm, reference=None)


def reference_of(gm: fx.GraphModule) -> CapturedModule:
    """The graph that `KeepReference` kept.

    Raises:
        InputError: It kept none, or one that cannot be run batch by batch.

    Examples:
        >>> from graphopt.passes import KeepReference
        >>> gm = program.graph_module
        >>> _ = KeepReference()(gm)
        >>> torch.equal(reference_of(gm)(*example), model(*example))
        True
    """
    reference = findings_of(gm).reference
    if reference is None:
        raise InputError("KeepReference has kept no graph to compare with")
    return callable_graph(reference)


@dataclass(frozen=True)
class CorrectStatistics(Pass):
    """Estimate batch norms again, then correct biases: `ReestimateBatchNorm` and `CorrectBias`.

    Where every weight was fitted to its layer's outputs there is nothing left for them to correct.

    Attributes:
        data: Inputs of one call each, as for `as_batch`; some hundred samples suffice.

    Examples:
        >>> from graphopt.palettization import KMeansPalettizerConfig
        >>> from graphopt.passes import AnnotatePalettization, KeepReference, PalettizeWeights
        >>> gm = program.graph_module
        >>> annotate = AnnotatePalettization(KMeansPalettizerConfig())
        >>> for step in (KeepReference(), annotate, PalettizeWeights()):
        ...     _ = step(gm)
        >>> CorrectStatistics(batches)(gm).modified
        True
    """

    name: ClassVar[str] = "correct-statistics"
    after: ClassVar[tuple[type[Pass], ...]] = (KeepReference,)
    tolerance: ClassVar[float | None] = None
    data: Sequence[Any]

    @override
    def run(self, edit: Editor) -> None:
        if findings_of(edit.gm).fitted_to_outputs:
            return
        reference = reference_of(edit.gm)
        ReestimateBatchNorm(self.data, reference).run(edit)
        CorrectBias(self.data, reference).run(edit)
