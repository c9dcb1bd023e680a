"""Options of lowering to Core ML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from graphopt.backends.options import TargetOptions, check_precision, in_shell
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

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if self.minimum_deployment_target not in _TARGETS:
            raise LoweringError(f"minimum_deployment_target must be one of {_TARGETS}")
