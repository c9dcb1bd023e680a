"""Options of lowering to Core AI."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from graphopt.backends.options import TargetOptions, check_precision, in_shell
from graphopt.backends.shapes import Shapes

__all__ = ["CoreAIOptions"]


@dataclass(frozen=True, kw_only=True)
class CoreAIOptions(TargetOptions):
    """What Core AI's `lower` takes.

    Attributes:
        precision: "float16" casts floats, inputs and outputs too, to 16 bits (`graphopt.casting`).
        shapes: Sizes of the inputs that the artifact takes: the example's; "open", those that the
            capture leaves open; or bounds or shapes by input, see `backends.shapes`. Shapes that are
            enumerated are taken as bounds.
        ignored_ops: Ops (or a predicate on nodes) that compute in float32 all the same.
        calibration_data: Inputs of one call each; values that overflow in float16 on them stay
            float32.

    Raises:
        LoweringError: There is no such precision.
    """

    precision: Literal["float32", "float16"] = field(
        default="float32",
        metadata=in_shell(
            ("float32", "float16"),
            "Float type of the artifact; the target's own default when omitted.",
        ),
    )

    shapes: Shapes = "example"
    ignored_ops: Any = None
    calibration_data: Iterable[Any] | None = None

    def __post_init__(self) -> None:
        check_precision(self.precision)
