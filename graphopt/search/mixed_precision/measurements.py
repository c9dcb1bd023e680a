"""Measurements: what every candidate of every layer costs, in accuracy and in bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from rich.table import Table
from torch import Tensor, nn
from torch.export import ExportedProgram

from graphopt.backends.lowering import as_program
from graphopt.errors import InputError, StateError
from graphopt.extras import require
from graphopt.files import replaced, write_csv
from graphopt.ir.program import Program
from graphopt.report.notebook import ShownAsTable
from graphopt.run.content import tensors_hash
from graphopt.search.mixed_precision.candidates import Candidate
from graphopt.search.mixed_precision.cross_terms import Matrix, cross_terms
from graphopt.search.mixed_precision.layers import Layer
from graphopt.search.mixed_precision.metrics import METRICS, Metric, as_metric, shown
from graphopt.search.mixed_precision.reach import Reach
from graphopt.search.mixed_precision.records import Header, Records
from graphopt.search.mixed_precision.solvers import Problem
from graphopt.specs.artifact import ArtifactSpec

if TYPE_CHECKING:
    import pandas as pd
__all__ = ["Matrix", "Measurements", "cross_terms"]


class Measurements(ShownAsTable):
    """Measurements of one model, and what follows from them without running it.

    Args:
        records: The measurements.
        program: The uncompressed program, where it is at hand.
        metric: The metric that decides, where it is the user's own.
    """

    def __init__(
        self, records: Records, program: Program | None = None, metric: Metric | None = None
    ) -> None:
        self._records = records
        self._program = program
        name = records.header.metrics[0]
        self._metric = metric or METRICS.get(name)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module | ExportedProgram | Program | str | Path | None = None,
        example_inputs: tuple[Any, ...] | Tensor | None = None,
        *,
        metric: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
    ) -> Self:
        """Read a table's file.

        Args:
            path: What `analyze` has written.
            model: The model that it was measured on; refining and sweeping need it.
            example_inputs: Inputs of one call of the model.
            metric: The user's own metric, if the table was measured with one.
            example_kwargs: Keyword inputs of that call.

        Raises:
            InputError: The file is no table, or the model is another one.
        """
        own = None if metric is None else as_metric(metric)
        table = cls(Records.load(Path(path)), None, own)
        if model is not None:
            table.attach(as_program(model, example_inputs, example_kwargs))
        return table

    def attach(self, program: Program) -> None:
        """Give the table the model that it was measured on.

        Raises:
            InputError: It is another one: other ops, shapes or weights.
        """
        program, header = as_program(program), self.header
        if tensors_hash(program.graph_module) != header.weights:
            raise InputError("the table was measured on another model: the weights differ")
        if program.fingerprint() != header.fingerprint:
            raise InputError("the table was measured on another model: the graph differs")
        self._program = program

    def __repr__(self) -> str:
        about = f"{len(self.layers)} layers, {len(self.candidates)} candidates"
        return f"{type(self).__name__}({about}, {', '.join(self.header.metrics)})"

    @property
    def program(self) -> Program:
        """The uncompressed program.

        Raises:
            StateError: The table was loaded without it.
        """
        if self._program is None:
            raise StateError("the table has no model; load it with model=, or attach() one")
        return self._program

    @property
    def has_program(self) -> bool:
        """Whether the uncompressed program is at hand."""
        return self._program is not None

    @property
    def header(self) -> Header:
        """What was measured, and how."""
        return self._records.header

    @property
    def artifact(self) -> ArtifactSpec | None:
        """The file that the sizes are of; None where no target was named."""
        backend = self.header.sizes["backend"]
        if backend is None:
            return None
        return ArtifactSpec(backend=backend, lowering=self.header.lowering)

    def with_header(self, header: Header) -> Self:
        """The same measurements with other sizes; they are kept in memory alone."""
        records = replace(self._records, header=header, path=None, file=None)
        return type(self)(records, self._program, self._metric)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Layers in the order of the graph."""
        return self.header.layers

    @property
    def candidates(self) -> dict[str, Candidate]:
        """All candidates by name."""
        return self.header.candidates

    @property
    def metric(self) -> Metric:
        """The metric that decides.

        Raises:
            StateError: It is the user's own and the table was loaded without it.
        """
        if self._metric is None:
            name = self.header.metrics[0]
            raise StateError(f"the table was measured with {name!r}; load it with metric=")
        return self._metric

    @property
    def batches(self) -> int:
        """Number of batches that everything was measured on."""
        return len(self._batches())

    def _batches(self) -> list[int]:
        complete = set(self._records.hashes)
        if self.header.mode != "fast":
            done = self._records.values
            complete = {
                b for b in complete if all((b, layer.name) in done for layer in self.layers)
            }
        if self.header.mode != "exact":
            complete &= set(self._records.vectors)
        return sorted(complete)

    @property
    def is_measured(self) -> bool:
        """Whether values were measured, not predicted."""
        return self.header.mode != "fast"

    # --- values ---------------------------------------------------------------------------------
    def values(self, metric: str | None = None) -> dict[str, dict[str, float]]:
        """Layer → candidate → the metric's mean over batches.

        Args:
            metric: One of those that were measured; None is the first.

        Raises:
            InputError: It was not measured.
            StateError: No batch is complete.
        """
        name = self.header.metrics[0] if metric is None else metric
        if name not in self.header.metrics:
            raise InputError(f"{name!r} was not measured; there are {list(self.header.metrics)}")
        batches = self._batches()
        if not batches:
            raise StateError("no batch is complete; run analyze() again with the same path")
        if not self.is_measured:
            if name != self.header.metrics[0]:
                raise InputError(f"the fast mode predicts {self.header.metrics[0]!r} alone")
            return self._predicted()
        reach = self._reach()
        return {layer.name: reach.mean(layer, name) for layer in self.layers}

    def _reach(self) -> Reach:
        return Reach(self._records, tuple(self._batches()))

    @property
    def without_gradient(self) -> list[str]:
        """Layers that no gradient reaches in the fast mode; their values are measured instead."""
        return list(self._reach().without_gradient)

    @property
    def missed(self) -> list[str]:
        """Layers that no batch reaches, as experts to which nothing is routed: of no known loss."""
        return self._reach().missed

    def _predicted(self) -> dict[str, dict[str, float]]:
        reach, predicted = self._reach(), {}
        for layer in self.layers:
            if reach.is_measured(layer.name):
                predicted[layer.name] = reach.mean(layer, self.header.metrics[0])
                continue
            losses = 0.5 * np.mean(reach.vectors(layer.name) ** 2, axis=0)
            predicted[layer.name] = {
                name: self.metric.value(float(loss))
                for name, loss in zip(layer.candidates, losses, strict=True)
            }
        return predicted

    def losses(self) -> list[list[float]]:
        """For each layer in order, the loss of each candidate: 0 for none, adding up over layers."""
        values, reach = self.values(), self._reach()
        return [
            [
                self._loss(reach, layer.name, name, values[layer.name][name])
                for name in layer.candidates
            ]
            for layer in self.layers
        ]

    def _loss(self, reach: Reach, layer: str, candidate: str, value: float) -> float:
        """Loss of a mean value, or the mean loss where a batch without any error is in it."""
        if math.isfinite(value) or not reach.is_measured(layer):
            return self.metric.loss(value)
        name = self.header.metrics[0]
        values = self._records.values
        measured = [values[batch, layer][candidate][name] for batch in reach.batches_of(layer)]
        return float(np.mean([self.metric.loss(single) for single in measured]))

    def problem(self) -> Problem:
        """Losses and sizes for the solvers."""
        return Problem.of(self.losses(), [layer.bits for layer in self.layers])

    def _all_vectors(self) -> npt.NDArray[np.float32]:
        return np.concatenate([self._records.vectors[batch] for batch in self._batches()])

    @property
    def has_interactions(self) -> bool:
        """Whether cross terms between layers are known."""
        return self.header.mode != "exact"

    def interactions(self) -> Matrix:
        """Cross terms Q of all candidates of all layers: the loss of a choice x is `½ xᵀQx`.

        Where values were measured they are the diagonal; see `cross_terms`.

        Returns:
            [n, n], n the number of candidates of all layers in order.

        Raises:
            StateError: The table has no vectors.
        """
        if not self.has_interactions:
            raise StateError("cross terms need mode='fast' or mode='hybrid'")
        vectors = self._all_vectors().astype(np.float64)
        flat = [loss for layer in self.losses() for loss in layer]
        known = self.is_measured or bool(self._reach().without_gradient)
        return cross_terms(vectors, self.owners(), flat if known else None)

    def owners(self) -> list[int]:
        """Number of the layer of each row and column of `interactions`."""
        return [number for number, layer in enumerate(self.layers) for _ in layer.candidates]

    def columns(self) -> list[tuple[str, str]]:
        """(layer, candidate) of each row and column of `interactions`."""
        return [(layer.name, name) for layer in self.layers for name in layer.candidates]

    def predict(self, choice: Mapping[str, str]) -> float:
        """Loss that a choice of candidates is expected to have, with cross terms where known.

        Args:
            choice: Layer → candidate; layers that are not named stay uncompressed.

        Raises:
            InputError: A layer or candidate is unknown.
        """
        columns = {pair: number for number, pair in enumerate(self.columns())}
        missing = [pair for pair in choice.items() if pair not in columns and pair[1] != "keep"]
        if missing:
            raise InputError(f"the table has no {missing[0][1]!r} for {missing[0][0]!r}")
        places = [columns[pair] for pair in choice.items() if pair in columns]
        if not self.has_interactions:
            flat = [loss for layer in self.losses() for loss in layer]
            return math.fsum(flat[place] for place in places)
        matrix = self.interactions()
        return 0.5 * float(matrix[np.ix_(places, places)].sum())

    # --- sizes ----------------------------------------------------------------------------------
    @property
    def weights(self) -> int:
        """Number of weights of all layers."""
        return sum(layer.numel for layer in self.layers)

    def bits_per_weight(self, bits: float) -> float:
        """Bits of all layers as bits per weight."""
        return bits / self.weights

    # --- output ---------------------------------------------------------------------------------
    def to_rows(self) -> list[dict[str, Any]]:
        """One row per layer and candidate, with every metric."""
        values = {name: self.values(name) for name in self._listed()}
        return [
            {
                "layer": layer.name,
                "module_type": layer.module_type,
                "shape": "×".join(map(str, layer.shape)),
                "weights": layer.numel,
                "candidate": name,
                "bytes": bits // 8,
                "bits_per_weight": bits / layer.numel,
                **{metric: by_layer[layer.name][name] for metric, by_layer in values.items()},
            }
            for layer in self.layers
            for name, bits in zip(layer.candidates, layer.bits, strict=True)
        ]

    def _listed(self) -> tuple[str, ...]:
        return self.header.metrics if self.is_measured else self.header.metrics[:1]

    def to_pandas(self) -> pd.DataFrame:
        """The rows as a data frame.

        Raises:
            MissingDependencyError: pandas is not installed (extra "plot").
        """
        pd = require("pandas", "plot")
        return pd.DataFrame(self.to_rows())

    def to_csv(self, path: str | Path) -> Path:
        """Write the rows as CSV."""
        rows = self.to_rows()
        return write_csv(Path(path), rows, list(rows[0]))

    def to_parquet(self, path: str | Path) -> Path:
        """Write the rows as Parquet.

        Raises:
            MissingDependencyError: pandas or pyarrow is not installed (extra "plot").
        """
        require("pyarrow", "plot")
        with replaced(Path(path)) as temporary:
            self.to_pandas().to_parquet(temporary)
        return Path(path)

    def __rich__(self) -> Table:
        metric = self.header.metrics[0]
        kind = "measured" if self.is_measured else "predicted"
        peak = "; peak: the reference's largest magnitude" if metric == "psnr" else ""
        table = Table(title=f"{metric} of each layer alone, {kind}{peak}")
        for heading, side in (
            ("layer", "left"),
            ("config", "left"),
            ("KiB", "right"),
            (metric, "right"),
        ):
            table.add_column(heading, justify=side, overflow="fold")  # type: ignore[arg-type]
        for row in self.to_rows():
            size = f"{row['bytes'] / 1024:.2f}"
            table.add_row(row["layer"], row["candidate"], size, shown(metric, row[metric]))
        return table
