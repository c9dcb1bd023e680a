"""What the fit of one layer sees, in a form that travels, and which layers can be fitted side by side."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from graphopt.analysis.matrix_form import MatrixUse, WeightUse
from graphopt.fitting.moments import (
    LayerMoments,
    Sample,
    collect_moments,
    missing_beside,
    operand_beside,
)
from graphopt.run.layerwise import LayerwiseRun

__all__ = ["LayerData", "fitted_together"]


@dataclass(frozen=True)
class LayerData:
    """Values around one op, for each batch.

    Attributes:
        inputs: Its input.
        wanted: Its input in the exact program.
        saliency: [batch, positions], or None for all positions alike.
        missing: What `missing_beside` has found.
    """

    inputs: Sequence[Tensor]
    wanted: Sequence[Tensor]
    saliency: Sequence[Tensor] | None = None
    missing: Sequence[tuple[Tensor, Tensor]] | None = None

    @classmethod
    def of(
        cls,
        use: WeightUse,
        run: LayerwiseRun,
        reference: LayerwiseRun,
        partners: Mapping[fx.Node, fx.Node],
        saliency: Sequence[Tensor] | None = None,
    ) -> LayerData:
        """The values as they are, where two runs stand.

        Args:
            use: The op.
            run: The program that is being compressed.
            reference: The exact one.
            partners: Nodes of the first → nodes of the second.
            saliency: Of the op's positions.
        """
        return cls(
            run.values(use.data),
            reference.values(partners[use.data]),
            saliency,
            missing_beside(use, run, reference, partners),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        lists: dict[str, Sequence[Tensor] | None] = {
            "inputs": self.inputs,
            "wanted": self.wanted,
            "saliency": self.saliency,
        }
        if self.missing is not None:
            lists |= {
                "exact": [exact for exact, _ in self.missing],
                "actual": [actual for _, actual in self.missing],
            }
        return {
            f"{kind}.{number}": value
            for kind, values in lists.items()
            for number, value in enumerate(values or ())
        }

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> LayerData:
        """From what `tensors` gave, among others."""

        def listed(kind: str) -> list[Tensor]:
            count = sum(name.startswith(f"{kind}.") for name in tensors)
            return [tensors[f"{kind}.{number}"] for number in range(count)]

        pairs = list(zip(listed("exact"), listed("actual"), strict=True))
        return cls(listed("inputs"), listed("wanted"), listed("saliency") or None, pairs or None)

    def moments(self, use: MatrixUse, *, centred: bool, sample: Sample) -> LayerMoments | None:
        """As `collect_moments` gives them."""
        values = (self.inputs, self.wanted, self.saliency, self.missing)
        return collect_moments(use, *values, centred=centred, sample=sample)


def fitted_together(
    first: WeightUse,
    others: Iterable[WeightUse],
    run: LayerwiseRun,
    partners: Container[fx.Node],
) -> list[WeightUse]:
    """The layers, `first` among them, that see now what they will see when their turn comes.

    Such as the projections of one attention, which read the same values: their fits need nothing of each
    other. A layer that is summed up with another one waits for it, to make up for its error.

    Args:
        first: The layer whose turn it is.
        others: Layers behind it.
        run: The program that is being compressed, where it stands before `first`.
        partners: Nodes that the exact program has as well.
    """
    place = run.interpreter.place

    def is_settled(use: WeightUse) -> bool:
        if not run.has_values(use.data):  # constants depend on weights, which may change
            return False
        beside = operand_beside(use, partners)
        return beside is None or place[beside] > place[use.node] or run.has_values(beside)

    return [first, *(use for use in others if is_settled(use))]
