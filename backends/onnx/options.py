"""Options of lowering to ONNX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from graphopt.backends.options import TargetOptions, in_shell
from graphopt.errors import LoweringError

__all__ = ["ONNXOptions"]

_MATMULS = ("standard", "nbits")


@dataclass(frozen=True, kw_only=True)
class ONNXOptions(TargetOptions):
    """What ONNX's `lower` takes.

    Attributes:
        dynamic: Leave the dimensions open that the graph leaves open.
        matmul: "nbits" multiplies by integer weights of 4 and 8 bits with ONNX Runtime's own
            `com.microsoft.MatMulNBits`, wherever that computes the same; all else, and everything
            with "standard", is in ops of the standard.

    Raises:
        LoweringError: There is no such form of products.
    """

    dynamic: bool = True
    matmul: Literal["standard", "nbits"] = field(
        default="standard",
        metadata=in_shell(
            _MATMULS, "For .onnx: products with 4- and 8-bit weights in ONNX Runtime's own op."
        ),
    )

    def __post_init__(self) -> None:
        if self.matmul not in _MATMULS:
            raise LoweringError(f"matmul must be one of {list(_MATMULS)}, got {self.matmul!r}")
