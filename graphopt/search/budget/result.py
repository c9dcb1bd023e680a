"""FitResult: the artifact of a size, its errors, and what a little more or less would bring."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from graphopt.backends.artifact import Artifact
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.report.notebook import ShownAsTable
from graphopt.search.mixed_precision.recipe import Recipe

__all__ = ["Alternative", "FitResult", "MeasuredError"]


@dataclass(frozen=True)
class MeasuredError:
    """How far the compressed program's outputs are from the model's.

    Attributes:
        psnr: Peak signal-to-noise ratio in dB, the peak being the model's largest output of a call;
            the mean over calls and outputs.
        cosine: Cosine similarity along the last axis, the mean likewise.
        calls: Number of calls.
        data: Which calls: "held out", "fitted to" where there is one call only, or "example" where
            no data were given.
    """

    psnr: float
    cosine: float
    calls: int
    data: str

    def __str__(self) -> str:
        calls = "1 call" if self.calls == 1 else f"{self.calls} calls"
        size = "no error" if self.psnr == math.inf else f"{self.psnr:.1f} dB"
        return f"{size}, cosine {self.cosine:.4f} ({calls}, {self.data})"


@dataclass(frozen=True)
class Alternative:
    """Another choice for the layers.

    Attributes:
        recipe: The choice.
        size: Bytes of its artifact, estimated: its tensors, and what the artifact that was made has
            besides.
        predicted: Predicted PSNR in dB.
    """

    recipe: Recipe
    size: int
    predicted: float


@dataclass(frozen=True)
class FitResult(ShownAsTable):
    """What `graphopt.fit` returns.

    Attributes:
        artifact: What was saved, with `path`, `size`, `verify()` and `verification`.
        program: The compressed program that it holds, with `report()`.
        recipe: What each layer became.
        asked: Bytes that were asked for.
        predicted: PSNR in dB that the sensitivities of the layers predict before anything is fitted.
        measured: Error of the compressed program.
        better: The smallest choice that is predicted to be 1 dB better; None where there is none.
        smaller: The best choice that is predicted to be 1 dB worse; None where there is none.
        seconds: Time that it took.

    Examples:
        >>> result = graphopt.fit(model, example, batches, size="64kB", path="fitted.pt2")
        >>> isinstance(result, FitResult), result.size <= result.asked, result.measured.psnr > 20
        (True, True, True)
    """

    artifact: Artifact
    program: CompressedProgram
    recipe: Recipe
    asked: int
    predicted: float
    measured: MeasuredError
    better: Alternative | None
    smaller: Alternative | None
    seconds: float

    @property
    def size(self) -> int:
        """Bytes of the artifact."""
        return self.artifact.size

    @property
    def alternatives(self) -> tuple[Alternative, ...]:
        """The next smaller and the next better choice, as far as there are."""
        return tuple(each for each in (self.smaller, self.better) if each is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; numbers of bytes, dB and seconds."""
        outcome = self.artifact.verification
        return {
            "path": str(self.artifact.path),
            "target": str(self.artifact.backend.target),
            "asked": self.asked,
            "bytes": self.size,
            "bits_per_weight": self.recipe.bits_per_weight,
            "predicted_psnr": self.predicted,
            "measured_psnr": self.measured.psnr,
            "measured_cosine": self.measured.cosine,
            "measured_calls": self.measured.calls,
            "measured_on": self.measured.data,
            "artifact_error": None if outcome is None else outcome.max_error,
            "layers": dict(self.recipe.choice),
            "smaller": _plain(self.smaller),
            "better": _plain(self.better),
            "seconds": self.seconds,
        }

    def __rich__(self) -> Group:
        target = self.artifact.backend.name
        table = Table(
            title=f"{self.artifact.path}: {self.size:,} of {self.asked:,} bytes for {target}"
        )
        for heading in ("", "bytes", "bits/weight", "predicted PSNR", "measured"):
            table.add_column(heading, justify="right" if heading else "left")
        rows = [("this file", f"{self.size:,}", self.recipe, self.predicted, self.measured.psnr)]
        for name, choice in (("next smaller", self.smaller), ("next better", self.better)):
            if choice is not None:
                size = f"about {choice.size:,}"
                row = (name, size, choice.recipe, choice.predicted, math.nan)
                rows.insert(0 if choice is self.smaller else len(rows), row)
        for name, size, recipe, predicted, measured in rows:
            dense = f"{recipe.bits_per_weight:.3f}"
            table.add_row(name, size, dense, _decibels(predicted), _decibels(measured))
        return Group(table, Text(f"measured: {self.measured}"))

    def __repr__(self) -> str:
        name = self.artifact.path.name if self.artifact.path is not None else "unsaved"
        return f"FitResult({name}: {self.size:,} of {self.asked:,} bytes, {self.measured})"


def _decibels(value: float) -> str:
    if math.isnan(value):
        return ""
    return "exact" if value == math.inf else f"{value:.1f} dB"


def _plain(choice: Alternative | None) -> dict[str, Any] | None:
    if choice is None:
        return None
    dense = choice.recipe.bits_per_weight
    return {"bytes": choice.size, "predicted_psnr": choice.predicted, "bits_per_weight": dense}
