"""Options of lowering to Core ML."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from graphopt.backends.options import TargetOptions, check_precision, in_shell
from graphopt.backends.shapes import Shapes
from graphopt.errors import LoweringError

__all__ = ["CoreMLOptions", "DeploymentTarget"]

DeploymentTarget = Literal["iOS16", "iOS17", "iOS18", "iOS26"]
_TARGETS = ("iOS16", "iOS17", "iOS18", "iOS26")


@dataclass(frozen=True, kw_only=True)
class CoreMLOptions(TargetOptions):
    """What Core ML's `lower` takes.

    Attributes:
        minimum_deployment_target: "iOS16" and "iOS17" take one scalar table per tensor in the older
            packed form; "iOS18" and later everything.
        precision: Type in which Core ML computes; tables are stored in it.
        shapes: Sizes of the inputs that the artifact takes: the example's; "open", those that the
            capture leaves open (`RangeDim`); or by input bounds, or a list of shapes
            (`EnumeratedShapes`), see `backends.shapes`.
        ignored_ops: Ops (or a predicate on nodes) that compute in float32 all the same.
        calibration_data: Inputs of one call each; values that overflow in float16 on them, or on the
            example, stay float32.

    Raises:
        LoweringError: There is no such deployment target or precision.
    """

    minimum_deployment_target: DeploymentTarget = "iOS18"
    precision: Literal["float16", "float32"] = field(
        default="float16",
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
        if self.minimum_deployment_target not in _TARGETS:
            raise LoweringError(f"minimum_deployment_target must be one of {_TARGETS}")
