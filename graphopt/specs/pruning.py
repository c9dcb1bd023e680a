"""PruningSpec: which weights become zero."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_serializer

from graphopt.specs.model import SpecModel

__all__ = [
    "ChannelStructured",
    "ConstantSparsitySchedule",
    "PolynomialDecaySchedule",
    "PruningScheme",
    "PruningSpec",
    "SparsitySchedule",
    "Unstructured",
]


class Unstructured(SpecModel):
    """Any element may become zero."""

    type: Literal["unstructured"] = Field(default="unstructured", repr=False)
    axis: None = None


class ChannelStructured(SpecModel):
    """Whole channels of `axis` become zero."""

    type: Literal["channel_structured"] = Field(default="channel_structured", repr=False)
    axis: int = 0


PruningScheme = Annotated[Unstructured | ChannelStructured, Field(discriminator="type")]


class PruningSpec(SpecModel):
    """Set a fraction of a weight to zero.

    Attributes:
        target_sparsity: Fraction of zeros in [0, 1].
        pruning_scheme: Single elements or whole channels.
        pruning_algo: "default" is by magnitude; or a class.
    """

    target_sparsity: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    pruning_scheme: PruningScheme = Field(default_factory=Unstructured)
    pruning_algo: Literal["default"] | type = "default"

    @field_serializer("pruning_algo")
    def _class_name(self, value: str | type) -> str:
        return value if isinstance(value, str) else f"{value.__module__}.{value.__qualname__}"


class ConstantSparsitySchedule(SpecModel):
    """Full sparsity from `begin_step` on."""

    type: Literal["constant"] = Field(default="constant", repr=False)
    begin_step: Annotated[int, Field(ge=0)] = 0


class PolynomialDecaySchedule(SpecModel):
    """Sparsity rises from `initial_sparsity` along a polynomial over `total_iters` steps."""

    type: Literal["polynomial_decay"] = Field(default="polynomial_decay", repr=False)
    total_iters: Annotated[int, Field(gt=0)]
    begin_step: Annotated[int, Field(ge=0)] = 0
    power: float = 3.0
    initial_sparsity: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    update_frequency: Annotated[int, Field(gt=0)] = 1


SparsitySchedule = Annotated[
    ConstantSparsitySchedule | PolynomialDecaySchedule, Field(discriminator="type")
]
