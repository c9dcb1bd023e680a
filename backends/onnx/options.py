"""Options of lowering to ONNX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from graphopt.backends.options import TargetOptions, in_shell
from graphopt.backends.shapes import Shapes
from graphopt.errors import LoweringError

__all__ = ["ONNXOptions"]

_WEIGHTS = ("folded", "dequantize")
_MATMULS = ("standard", "nbits")
_KERNELS = ("any", "vnni")


@dataclass(frozen=True, kw_only=True)
class ONNXOptions(TargetOptions):
    """What ONNX's `lower` takes.

    Attributes:
        dynamic: Leave the dimensions open that the graph leaves open.
        shapes: Sizes of the inputs that the artifact takes: "captured", those that the capture leaves
            open, as `dynamic` says, or the example's, with a warning, where they cannot be converted;
            "open", the same or an error, and compared at three sizes; "example"; or bounds or shapes by
            input, see `backends.shapes`, between which the artifact is compared, as the format has none.
        weights: What integers with scales become where no kernel of integers takes them. "folded":
            casts and products of constants, which ONNX Runtime computes once, when it loads the
            model. "dequantize": `DequantizeLinear`, which other runtimes and execution providers know
            and ONNX Runtime's CPU kernels compute in every call.
        matmul: "nbits" multiplies by integer weights of 4 and 8 bits with ONNX Runtime's own
            `com.microsoft.MatMulNBits`, wherever that computes the same, tables of 8-bit integers in
            linear layers among them, whose entries take the place of their codes; all else, and
            everything with "standard", is in ops of the standard.

        kernels: Type of the weights that kernels of integers take. "any": uint8 with zero point 128,
            exact on every CPU. "vnni": int8, for CPUs with VNNI instructions, whose kernels compute
            the same with them in a third to half of the time; on x86 CPUs without, ONNX Runtime adds up
            pairs of products in 16 bits, which saturate.

    Raises:
        LoweringError: There is no such form of weights, products or kernels.
    """

    dynamic: bool = True
    shapes: Shapes = "captured"
    weights: Literal["folded", "dequantize"] = field(
        default="folded",
        metadata=in_shell(_WEIGHTS, "For .onnx: what integer weights with scales become."),
    )
    matmul: Literal["standard", "nbits"] = field(
        default="standard",
        metadata=in_shell(
            _MATMULS, "For .onnx: products with 4- and 8-bit weights in ONNX Runtime's own op."
        ),
    )
    kernels: Literal["any", "vnni"] = field(
        default="any",
        metadata=in_shell(_KERNELS, "For .onnx: what CPUs integers are computed on."),
    )

    def __post_init__(self) -> None:
        if self.weights not in _WEIGHTS:
            raise LoweringError(f"weights must be one of {list(_WEIGHTS)}, got {self.weights!r}")
        if self.matmul not in _MATMULS:
            raise LoweringError(f"matmul must be one of {list(_MATMULS)}, got {self.matmul!r}")
        if self.kernels not in _KERNELS:
            raise LoweringError(f"kernels must be one of {list(_KERNELS)}, got {self.kernels!r}")
