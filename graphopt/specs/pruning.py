"""PruningSpec: which weights become zero."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import Field, field_serializer, model_validator

from graphopt.specs.compression import CompressionSpec
from graphopt.specs.model import SpecModel

__all__ = [
    "BlockStructured",
    "ChannelStructured",
    "ConstantSparsitySchedule",
    "NMStructured",
    "PolynomialDecaySchedule",
    "PruningScheme",
    "PruningSpec",
    "SparsitySchedule",
    "SparsityScheduleBase",
    "Unstructured",
    "default_weight_pruning_spec",
]


class Unstructured(SpecModel):
    """Any element may become zero.

    Examples:
        >>> graphopt.pruning.PruningSpec(target_sparsity=0.9).pruning_scheme
        Unstructured(axis=None)
    """

    type: Literal["unstructured"] = Field(default="unstructured", repr=False)
    axis: None = None


class ChannelStructured(SpecModel):
    """Whole channels of `axis` become zero.

    Examples:
        >>> graphopt.pruning.PruningSpec(pruning_scheme=ChannelStructured(axis=0)).pruning_scheme
        ChannelStructured(axis=0)
    """

    type: Literal["channel_structured"] = Field(default="channel_structured", repr=False)
    axis: int = 0


class BlockStructured(SpecModel):
    """Blocks of `block_size` neighbours along `axis` become zero; the smallest norms first.

    Examples:
        >>> BlockStructured(axis=1, block_size=4)
        BlockStructured(axis=1, block_size=4)
    """

    type: Literal["block_structured"] = Field(default="block_structured", repr=False)
    axis: int = 0
    block_size: Annotated[int, Field(gt=1)] = 2


class NMStructured(SpecModel):
    """`n` of every `m` neighbours along `axis` become zero; `target_sparsity` is then n / m.

    Examples:
        >>> graphopt.pruning.PruningSpec(pruning_scheme=NMStructured(n=2, m=4)).final_sparsity
        0.5
    """

    type: Literal["n_m_structured"] = Field(default="n_m_structured", repr=False)
    axis: int = 1
    n: Annotated[int, Field(ge=0)] = 2
    m: Annotated[int, Field(gt=0)] = 4

    @model_validator(mode="after")
    def _no_more_than_all(self) -> NMStructured:
        if self.n > self.m:
            raise ValueError(f"n={self.n} of m={self.m} cannot become zero")
        return self


PruningScheme = Annotated[
    Unstructured | ChannelStructured | BlockStructured | NMStructured, Field(discriminator="type")
]


class PruningSpec(CompressionSpec):
    """Set a fraction of a weight to zero.

    Attributes:
        target_sparsity: Fraction of zeros in [0, 1].
        pruning_scheme: Single elements, whole channels, blocks, or n of every m.
        pruning_algo: "default" is by magnitude; or a class with `compute_mask(weight, sparsity,
            scheme)`, which returns 1 or True where an element stays.

    Examples:
        >>> PruningSpec(target_sparsity=0.75).target_sparsity
        0.75
    """

    target_sparsity: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    pruning_scheme: PruningScheme = Field(default_factory=Unstructured)
    pruning_algo: Literal["default"] | type = "default"

    @property
    def final_sparsity(self) -> float:
        """Share of zeros at the end."""
        scheme = self.pruning_scheme
        return scheme.n / scheme.m if isinstance(scheme, NMStructured) else self.target_sparsity

    @field_serializer("pruning_algo")
    def _class_name(self, value: str | type) -> str:
        return value if isinstance(value, str) else f"{value.__module__}.{value.__qualname__}"


class SparsityScheduleBase(SpecModel, ABC):
    """Share of zeros by training step.

    Examples:
        >>> from graphopt.pruning import ConstantSparsitySchedule
        >>> isinstance(ConstantSparsitySchedule(), SparsityScheduleBase)
        True
    """

    @abstractmethod
    def compute_sparsity(
        self, step_count: int, target_sparsity: float, prev_sparsity: float | None = None
    ) -> float:
        """Share of zeros after `step_count` steps.

        Args:
            step_count: Training steps that were counted.
            target_sparsity: Share of zeros at the end, in [0, 1].
            prev_sparsity: Share that the mask has now.
        """


class ConstantSparsitySchedule(SparsityScheduleBase):
    """Full sparsity from `begin_step` on.

    Examples:
        >>> schedule = ConstantSparsitySchedule(begin_step=10)
        >>> schedule.compute_sparsity(9, 0.5), schedule.compute_sparsity(10, 0.5)
        (0.0, 0.5)
    """

    type: Literal["constant"] = Field(default="constant", repr=False)
    begin_step: Annotated[int, Field(ge=0)] = 0

    def compute_sparsity(
        self, step_count: int, target_sparsity: float, prev_sparsity: float | None = None
    ) -> float:
        """Share of zeros after `step_count` steps."""
        del prev_sparsity
        return target_sparsity if step_count >= self.begin_step else 0.0


class PolynomialDecaySchedule(SparsityScheduleBase):
    """Sparsity rises from `initial_sparsity` along a polynomial over `total_iters` steps.

    With `u = update_frequency`, `n = ⌊(total_iters − 1) / u⌋ + 1` updates and `t = ⌊(step − begin) / u⌋ /
    (n − 1)` it is `target + (initial − target) · (1 − t)^power` (Zhu and Gupta, "To prune, or not to
    prune", arXiv 1710.01878, equation 1), and stays between updates.

    Examples:
        >>> schedule = PolynomialDecaySchedule(total_iters=11, power=1.0)
        >>> schedule.compute_sparsity(5, 0.5)
        0.25
    """

    type: Literal["polynomial_decay"] = Field(default="polynomial_decay", repr=False)
    total_iters: Annotated[int, Field(gt=0)]
    begin_step: Annotated[int, Field(ge=0)] = 0
    power: Annotated[float, Field(gt=0)] = 3.0
    initial_sparsity: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    update_frequency: Annotated[int, Field(gt=0)] = 1

    def compute_sparsity(
        self, step_count: int, target_sparsity: float, prev_sparsity: float | None = None
    ) -> float:
        """Share of zeros after `step_count` steps; between updates it is that of the last one."""
        del prev_sparsity
        done = step_count - self.begin_step
        if done < 0:
            return self.initial_sparsity
        if done >= self.total_iters:
            return target_sparsity
        updates = (self.total_iters - 1) // self.update_frequency + 1
        share = done // self.update_frequency / max(updates - 1, 1)
        gap = self.initial_sparsity - target_sparsity
        return target_sparsity + gap * (1 - share) ** self.power


SparsitySchedule = Annotated[
    ConstantSparsitySchedule | PolynomialDecaySchedule, Field(discriminator="type")
]


def default_weight_pruning_spec() -> PruningSpec:
    """Half of a weight's elements, the smallest, become zero.

    Examples:
        >>> default_weight_pruning_spec().target_sparsity
        0.5
    """
    return PruningSpec()
