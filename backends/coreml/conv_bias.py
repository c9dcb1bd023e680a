"""coremltools' fusion of biases into convolutions, where it is right.

It reads the weight's value, which a compressed weight has none of (it is the result of a
`constexpr` op), takes a transposed convolution's channels per group for its channels, and negates
a constant that is subtracted in place, for its other readers too.
"""

from __future__ import annotations

from typing import Any

__all__ = ["FUSE_CONV_BIAS", "THEIRS", "register_fusion"]

FUSE_CONV_BIAS = "graphopt::fuse_conv_bias_of_constant_weights"
THEIRS = "common::fuse_conv_bias"


def register_fusion() -> None:
    """Teach coremltools the pass; calling it again does nothing."""
    from coremltools.converters.mil.mil.passes.defs.optimize_conv import fuse_conv_bias
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass

    if FUSE_CONV_BIAS in PASS_REGISTRY:
        return

    class FuseConvBiasOfConstantWeights(fuse_conv_bias):  # type: ignore[misc]
        @staticmethod
        def _try_to_transform(conv_op: Any, add_op: Any) -> bool:
            grouped = conv_op.op_type == "conv_transpose" and conv_op.groups.val != 1
            if grouped or add_op.op_type == "sub":
                return False
            return bool(fuse_conv_bias._try_to_transform(conv_op, add_op))

        @staticmethod
        def _try_to_transform_transpose_pattern(conv_op: Any, block: Any) -> bool:
            if conv_op.op_type not in ("conv", "conv_transpose") or conv_op.weight.val is None:
                return False
            return bool(fuse_conv_bias._try_to_transform_transpose_pattern(conv_op, block))

    FuseConvBiasOfConstantWeights.__name__ = FUSE_CONV_BIAS.split("::")[1]
    register_pass(namespace="graphopt")(FuseConvBiasOfConstantWeights)
