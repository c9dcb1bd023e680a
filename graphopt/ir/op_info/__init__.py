"""What each op is, said once: names, weights, scales, views, norms, and what folds into what.

`register(OpInfo(…))` makes a user's own op known; `info_of` tells what is known of a node.
"""

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
from graphopt.ir.op_info.norms_table import BATCH_NORM
from graphopt.ir.op_info.questions import (
    eps_of,
    is_batch_norm,
    is_cast,
    is_training,
    momentum_of,
    op_names,
    view_of,
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

__all__ = [
    "BATCH_NORM",
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
    "eps_of",
    "info_of",
    "is_batch_norm",
    "is_cast",
    "is_training",
    "known_ops",
    "momentum_of",
    "named",
    "op_names",
    "register",
    "targets",
    "view_of",
]
