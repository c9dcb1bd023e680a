"""Norms, dropouts and noise."""

from __future__ import annotations

import torch

import graphopt.ir.ops  # noqa: F401 - registers the stand-in of dropouts
from graphopt.ir.op_info.model import BatchNormArguments, NormArguments, OpInfo, Scales
from graphopt.ir.op_info.overloads import aten

__all__ = ["BATCH_NORM", "NORM_OPS", "RRELU", "TRACKED"]

# the batch norm of captured graphs: it always uses its stored statistics
BATCH_NORM = aten("_native_batch_norm_legit_no_training")[0]
RRELU = aten("rrelu")[0]
TRACKED = "num_batches_tracked"  # name of the buffer in which norms count batches

NORM_OPS: tuple[OpInfo, ...] = (
    OpInfo(
        ("batch_norm",),
        (BATCH_NORM,),
        norm=NormArguments(1, 2, axis=1),
        batch_norm=BatchNormArguments(5, 6, gives_tuple=True),
        fresh=True,
    ),
    OpInfo(
        ("batch_norm",),
        aten("batch_norm"),
        norm=NormArguments(1, 2, axis=1),
        batch_norm=BatchNormArguments(6, 7, training=5),
        training=5,
        kept_whole=True,
    ),
    OpInfo(
        ("layer_norm",),
        aten("layer_norm"),
        scales=Scales.FLOAT,
        norm=NormArguments(2, 3),
        kept_whole=True,
    ),
    OpInfo(
        ("layer_norm",), aten("native_layer_norm"), scales=Scales.FLOAT, norm=NormArguments(2, 3)
    ),
    OpInfo(
        ("group_norm",), aten("group_norm"), scales=Scales.FLOAT, norm=NormArguments(2, 3, axis=1)
    ),
    OpInfo(
        ("group_norm",),
        aten("native_group_norm"),
        scales=Scales.FLOAT,
        norm=NormArguments(1, 2, axis=1),
    ),
    OpInfo(("rms_norm",), aten("rms_norm"), scales=Scales.FLOAT, norm=NormArguments(2)),
    OpInfo(
        ("instance_norm",),
        aten("instance_norm"),
        scales=Scales.FLOAT,
        norm=NormArguments(1, 2, axis=1),
    ),
    *(
        OpInfo((name,), aten(f"{name} {name}_"), dropout=True, training=2, kept_whole=True)
        for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    ),
    OpInfo(("rrelu",), aten("rrelu rrelu_"), noise=True, training=3, kept_whole=True),
    OpInfo(("dropout",), (torch.ops.graphopt.dropout.default,), dropout=True, copies=True),
)
