"""What each op is, said once: names, weights, scales, views, norms, and what folds into what.

`info_of` tells what is known of a node, and `register` makes an op of one's own known: weights of
it are then palettized, quantized, pruned, searched and reported like those of a linear layer. Suppose
that `mine::fast_linear(x, w, b)` is registered with `torch.library` and computes `x @ wᵀ + b`:

    from graphopt.ir import op_info
    from graphopt.ir.op_info import BiasSlot, OpInfo, Scales, WeightSlot

    FAST_LINEAR = OpInfo(
        names=("fast_linear",),  # what configs call it
        targets=(torch.ops.mine.fast_linear.default,),
        weights=(WeightSlot(1, channel_axis=0, matrix="linear", data=0, bias=2),),
        biases=(BiasSlot(2),),
        scales=Scales.COMPUTE,
    )

For a while, undone at the end of the block:

    with op_info.register(FAST_LINEAR):
        palettizer = KMeansPalettizer(model, config)
        palettizer.prepare((x,))

For the rest of the process, best where the op itself is defined:

    op_info.register(FAST_LINEAR)

`register(info, replace=True)` says otherwise of an op that is known already. `matrix="linear"`
promises `x @ wᵀ`, which fits of whole layers rely on; without it they fit the weight's values alone.
"""

from graphopt.ir.op_info.activations_table import LEAKY_RELU
from graphopt.ir.op_info.model import (
    Activation,
    BatchNormArguments,
    BiasSlot,
    ConvolutionArguments,
    MatrixKind,
    NormArguments,
    OpInfo,
    Scales,
    View,
    WeightSlot,
)
from graphopt.ir.op_info.norms_table import BATCH_NORM, RRELU, TRACKED
from graphopt.ir.op_info.questions import (
    cast_type,
    eps_of,
    is_batch_norm,
    is_cast,
    is_training,
    momentum_of,
    noise_range,
    op_names,
    takes_sizes_alone,
    view_of,
    zeros_added,
)
from graphopt.ir.op_info.registry import (
    Registration,
    argument,
    info_of,
    known_ops,
    named,
    register,
    targets,
)
from graphopt.ir.op_info.views_table import without_memory_order

__all__ = [
    "BATCH_NORM",
    "LEAKY_RELU",
    "RRELU",
    "TRACKED",
    "Activation",
    "BatchNormArguments",
    "BiasSlot",
    "ConvolutionArguments",
    "MatrixKind",
    "NormArguments",
    "OpInfo",
    "Registration",
    "Scales",
    "View",
    "WeightSlot",
    "argument",
    "cast_type",
    "eps_of",
    "info_of",
    "is_batch_norm",
    "is_cast",
    "is_training",
    "known_ops",
    "momentum_of",
    "named",
    "noise_range",
    "op_names",
    "register",
    "takes_sizes_alone",
    "targets",
    "view_of",
    "without_memory_order",
    "zeros_added",
]
