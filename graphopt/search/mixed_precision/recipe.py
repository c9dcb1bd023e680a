"""Recipe: which candidate each layer gets, what it costs, and the config that does it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from graphopt.compressors.joint import joint_config
from graphopt.config.base import read_yaml
from graphopt.errors import ArtifactExistsError, InputError
from graphopt.files import replaced
from graphopt.ir.program import Program
from graphopt.report.notebook import ShownAsTable
from graphopt.schemes.registry import scheme_of
from graphopt.search.mixed_precision.candidates import KEEP, Candidate
from graphopt.search.mixed_precision.configs import AnyConfig, config_for
from graphopt.search.mixed_precision.layers import Layer
from graphopt.search.mixed_precision.metrics import shown
from graphopt.specs.artifact import ArtifactSpec

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe(ShownAsTable):
    """A choice for every layer.

    Attributes:
        choice: Layer → name of its candidate; "keep" leaves it uncompressed.
        candidates: The candidates by name.
        layers: The layers in the order of the graph.
        rest_bits: Stored bits of everything that was not up for choice.
        fingerprint: Hash of the graph that it is for.
        metric: Metric by which it was chosen.
        loss: Predicted loss.
        value: Predicted value of the metric.
        bound: No choice of this size has a smaller predicted loss; None where that is not known.
        solver: How it was found.
        budget: Bits that the layers were allowed, None without a size target.
        measured: The metric of the whole compressed model, where it was measured.
        file_bytes: Bytes of its artifact on the table's target, where that was measured.
        artifact: Target and options of its artifact, and the bytes that it may have; None where no
            target was named.

    Examples:
        >>> recipe = sensitivities.recipe(target_bpw=6)
        >>> isinstance(recipe, Recipe), recipe.choice, recipe.bits_per_weight <= 6
        (True, {'0.weight': '2-bit', '2.weight': 'keep'}, True)
    """

    choice: Mapping[str, str]
    candidates: Mapping[str, Candidate]
    layers: tuple[Layer, ...]
    rest_bits: int
    fingerprint: str
    metric: str
    loss: float
    value: float
    solver: str
    bound: float | None = None
    budget: float | None = None
    measured: float | None = field(default=None)
    file_bytes: int | None = None
    artifact: ArtifactSpec | None = None

    @property
    def bits(self) -> int:
        """Stored bits of all layers."""
        return sum(layer.bits_of(self.choice[layer.name]) for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over all layers: codes, tables, scales, uncompressed weights."""
        return self.bits / sum(layer.numel for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors of the program, layers and the rest."""
        return math.ceil((self.bits + self.rest_bits) / 8)

    @property
    def gap(self) -> float | None:
        """Predicted loss above the bound, relative to the loss; 0 is optimal."""
        if self.bound is None:
            return None
        return (self.loss - self.bound) / self.loss if self.loss > 0 else 0.0

    def predictions(self) -> dict[str, str]:
        """What was predicted, and measured, of the whole: "predicted psnr" → its value, for tiles."""
        found = {f"predicted {self.metric}": f"{self.value:.4g}"}
        if self.measured is not None:
            found[f"measured {self.metric}"] = f"{self.measured:.4g}"
        return found

    @property
    def distribution(self) -> dict[str, tuple[int, int]]:
        """Candidate → number of layers and of weights that have it."""
        counts: dict[str, tuple[int, int]] = {}
        for name in dict.fromkeys((*self.candidates, KEEP.name)):
            own = [layer.numel for layer in self.layers if self.choice[layer.name] == name]
            if own:
                counts[name] = (len(own), sum(own))
        return counts

    def __repr__(self) -> str:
        dense = f"{self.bits_per_weight:.3f} bits per weight, {self.bytes:,} bytes"
        return (
            f"Recipe({len(self.layers)} layers: {dense}, predicted {self.metric} {self.value:.4g})"
        )

    def to_config(self, *, algorithm: str | None = None) -> AnyConfig:
        """The config that the compressors and `graphopt.compress` take.

        Args:
            algorithm: How tables are found: "kmeans", "skm" or "gptq" (see `PalettizationSpec`);
                None leaves it as the candidates say.

        Returns:
            One that carries `artifact`, where there is one, so that what is compressed with it is
            lowered with these options and saved within the budget.
        """
        chosen = {}
        for layer in self.layers:
            candidate = self.candidates.get(self.choice[layer.name], KEEP)
            if algorithm is not None and candidate.weight is not None:
                spec = scheme_of(candidate.weight).with_algorithm(candidate.weight, algorithm)
                candidate = Candidate(candidate.name, spec, candidate.activation)
            chosen[layer.name] = candidate
        config = config_for(chosen, {layer.name: layer.nodes for layer in self.layers})
        if self.artifact is None:
            return config
        return joint_config(config).model_copy(update={"artifact": self.artifact})

    def check(self, program: Program) -> None:
        """Make sure that the recipe is for a program.

        Raises:
            InputError: Its graph is another one.
        """
        if program.fingerprint() != self.fingerprint:
            raise InputError(
                "the recipe was made for another graph; analyze this model, or capture it with the"
                " same example inputs"
            )

    # --- files ----------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        used = {self.choice[layer.name] for layer in self.layers}
        return {
            "recipe": {
                "fingerprint": self.fingerprint,
                "metric": self.metric,
                "solver": self.solver,
                "bits_per_weight": round(self.bits_per_weight, 4),
                "bytes": self.bytes,
                "loss": self.loss,
                "value": self.value,
                "bound": self.bound,
                "budget": self.budget,
                "measured": self.measured,
                "file_bytes": self.file_bytes,
                "artifact": None
                if self.artifact is None
                else self.artifact.model_dump(mode="json"),
                "rest_bits": self.rest_bits,
            },
            "candidates": {
                name: candidate.to_dict()
                for name, candidate in self.candidates.items()
                if name in used
            },
            "layers": {
                layer.name: {
                    "candidate": self.choice[layer.name],
                    "bits": layer.bits_of(self.choice[layer.name]),
                    "shape": list(layer.shape),
                    "output_axis": layer.output_axis,
                    "module_type": layer.module_type,
                    "nodes": list(layer.nodes),
                    "kept_bits": layer.kept_bits,
                }
                for layer in self.layers
            },
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write it as YAML.

        Raises:
            ArtifactExistsError: `path` exists and `overwrite` is False.
        """
        target = Path(path)
        if target.exists() and not overwrite:
            raise ArtifactExistsError(f"{target} exists; pass overwrite=True to replace it")
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        with replaced(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read what `save` has written.

        Raises:
            ConfigError: The file is no YAML mapping, or a candidate cannot be read.
            InputError: It is no recipe, or a layer names a candidate that is not defined.
        """
        data = read_yaml(Path(path), "recipe")
        try:
            head, listed = data["recipe"], data["layers"]
            candidates = {
                name: Candidate.from_dict(name, spec)
                for name, spec in (data.get("candidates") or {}).items()
            }
            layers, choice = [], {}
            for name, row in listed.items():
                choice[name] = row["candidate"]
                layers.append(
                    Layer(
                        name,
                        row["module_type"],
                        tuple(row["nodes"]),
                        tuple(row["shape"]),
                        row["output_axis"],
                        (row["candidate"],),
                        (row["bits"],),
                        row["kept_bits"],
                    )
                )
            known = {**head}
            for derived in ("bits_per_weight", "bytes"):
                known.pop(derived, None)
            if known.get("artifact") is not None:
                known["artifact"] = ArtifactSpec.model_validate(known["artifact"])
            recipe = cls(choice=choice, candidates=candidates, layers=tuple(layers), **known)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not a recipe: {error}") from None
        unknown = sorted({n for n in choice.values() if n not in candidates and n != KEEP.name})
        if unknown:
            raise InputError(f"{path}: candidates {unknown} are not defined")
        return recipe

    # --- output ---------------------------------------------------------------------------------
    def __rich__(self) -> Table:
        gap = "" if self.gap is None else f", at most {100 * self.gap:.2g} % above the optimum"
        gap = ", optimal" if self.gap == 0 else gap
        real = "" if self.measured is None else f", measured {shown(self.metric, self.measured)}"
        table = Table(
            title=f"{self.bits_per_weight:.3f} bits per weight, {self.bytes:,} bytes;"
            f" predicted {self.metric} {shown(self.metric, self.value)}{real} ({self.solver}{gap})"
        )
        for heading in ("config", "layers", "weights", ""):
            table.add_column(heading, justify="left" if heading in ("config", "") else "right")
        total = sum(layer.numel for layer in self.layers)
        for name, (count, weights) in self.distribution.items():
            bar = "█" * max(1, round(30 * weights / total))
            table.add_row(name, str(count), f"{100 * weights / total:.1f} %", bar)
        return table
