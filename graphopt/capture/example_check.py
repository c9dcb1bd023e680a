"""Whether the example inputs that lie in a file are inputs of the program in it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError

__all__ = ["check_example"]


def check_example(exported: ExportedProgram, args: Any, kwargs: Any) -> None:
    """Refuse example inputs that the program cannot take.

    Raises:
        CaptureError: Number, type or fixed sizes of one differ from what the graph was traced with.
    """
    names = set(exported.graph_signature.user_inputs)
    wanted = [node.meta.get("val") for node in exported.graph.nodes if node.name in names]
    try:
        given = pytree.tree_leaves((args, kwargs))
    except RecursionError:
        raise CaptureError("its example inputs are nested too deeply") from None
    tensors = [each for each in wanted if isinstance(each, Tensor)]
    held = [each for each in given if isinstance(each, Tensor)]
    if len(tensors) != len(held):
        raise CaptureError(f"it holds {len(held)} tensors as example, and takes {len(tensors)}")
    for place, (one, other) in enumerate(zip(held, tensors, strict=True)):
        fits = (
            one.dtype == other.dtype
            and one.layout == other.layout
            and (one.device.type == "meta") == (other.device.type == "meta")
            and one.ndim == other.ndim
            and all(
                size == known
                for size, known in zip(one.shape, other.shape, strict=True)
                if isinstance(known, int)
            )
        )
        if not fits:
            raise CaptureError(
                f"example input {place} is {one.dtype}{tuple(one.shape)} on {one.device}, {one.layout};"
                f" the program takes {other.dtype}{tuple(other.shape)}"
            )
