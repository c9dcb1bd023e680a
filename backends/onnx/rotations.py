"""Rotary embeddings whose angles are those of every sequence of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.backends.onnx.emitter import Emitter

__all__ = ["repeat_angles"]


def repeat_angles(model: Any) -> None:
    """Give `RotaryEmbedding` its cosines and sines for each element of the batch.

    The op does not broadcast, and onnxscript puts it in the place of products that do.

    Args:
        model: Of onnx_ir; it is changed.
    """
    emit = Emitter(model.graph)
    for node in [node for node in model.graph if node.op_type == "RotaryEmbedding"]:
        x, *angles = node.inputs[:3]
        if len(node.inputs) > 3 or all(_same(x.shape[0], each.shape) for each in angles):
            continue
        emit.place = node
        batch = emit.call("Shape", [x], x, kind="INT64", shape=[1], start=0, end=1)
        ones = emit.constant(np.ones(2, np.int64), "ones")
        sizes = emit.call("Concat", [batch, ones], batch, shape=[3], axis=0)
        for place, angle in enumerate(angles, start=1):
            rest = list(angle.shape)[1:] if angle.shape is not None else [None, None]
            made = emit.call("Expand", [angle, sizes], x, shape=[x.shape[0], *rest])
            node.replace_input_with(place, made)


def _same(batch: Any, shape: Any) -> bool:
    return shape is not None and shape[0] == batch
