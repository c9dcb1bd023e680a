"""Which ops XNNPACK has kernels of, in what form; everything else about an op is in `op_info`."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphopt.ir import op_info
from graphopt.ir.op_info import OpInfo
from graphopt.ir.torch_private import OpOverload

__all__ = [
    "CLAMPS",
    "CONCATENATIONS",
    "CONVOLUTIONS",
    "EMBEDDINGS",
    "FLOAT_OPS",
    "FUSED_ACTIVATIONS",
    "LAYOUT",
    "LINEAR",
    "MAX_NDIM",
    "RESHAPES",
    "VIEWS",
    "edge_info",
    "is_fused_activation",
    "takes_integers",
]

# what configs call the activations that are computed with the op before them
FUSED_ACTIVATIONS = frozenset({"relu", "relu6", "hardtanh", "clamp"})
# its products of two values, and these, are in float alone
FLOAT_OPS = frozenset(
    {"matmul", "baddbmm", "scaled_dot_product_attention"}
    | {"maximum", "minimum", "stack", "upsample", "avg_pool"}
)
# clamps with two ends become hardtanh before
_FUSED = frozenset(op_info.named("relu", "relu6", "hardtanh"))
CLAMPS = op_info.named("clamp")
CONCATENATIONS = op_info.named("cat")
LINEAR = frozenset(op_info.named("linear"))
EMBEDDINGS = frozenset(op_info.named("embedding"))
MAX_NDIM = 2  # spatial dimensions of convolutions
CONVOLUTIONS = frozenset(
    op_info.named("conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "convolution")
)
# rounding what these give with the scale of what they read changes nothing
LAYOUT = op_info.named(
    *("max_pool2d", "view", "reshape", "permute", "flatten", "transpose", "squeeze.dim"),
    *("squeeze.dims", "unsqueeze", "slice", "relu", "clone", "_unsafe_view", "pixel_shuffle"),
    *("upsample_nearest2d.vec", "expand", "constant_pad_nd"),
)
# these change nothing where they leave the sizes as they are
RESHAPES = op_info.named(
    *("clone", "slice", "view", "reshape", "_unsafe_view", "expand", "flatten"),
)
VIEWS = op_info.named("view", "_unsafe_view")  # these ask how their operand lies in memory


def takes_integers(node: fx.Node) -> bool:
    """Whether there is a kernel that computes an op with integer weights."""
    if node.target in LINEAR:
        return True
    info = op_info.info_of(node) if node.target in CONVOLUTIONS else None
    return info is not None and info.convolution is not None and info.convolution.ndim <= MAX_NDIM


def is_fused_activation(node: Any) -> bool:
    """Whether an activation, of aten or the edge dialect, is computed with the op before it."""
    return _aten_of(node) in _FUSED


def edge_info(node: Any) -> OpInfo | None:
    """What is known of an op in ExecuTorch's edge dialect, whose ops wrap those of aten."""
    info = op_info.info_of(_aten_of(node))
    return info.by_node(node) if info is not None and info.by_node is not None else info


def _aten_of(node: Any) -> Any:
    wrapped = getattr(node.target, "_op", None)
    return wrapped if isinstance(wrapped, OpOverload) else node.target
