"""Operands of one type, where a target takes each as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["JOINS", "joins_of_one_type", "operands_of_one_type"]

JOINS = ("cat", "stack", "hstack", "vstack", "dstack", "column_stack")


def joins_of_one_type(aten: Any, names: Sequence[str] = JOINS) -> dict[Any, Callable[..., Any]]:
    """Rules for ops that put tensors side by side: these in the type of the result.

    Args:
        aten: torch's namespace.
        names: Of these ops.
    """
    ops = [getattr(aten, name).default for name in names]
    return {op: functools.partial(_joined, op) for op in ops}


def _joined(op: Any, tensors: Sequence[Tensor], *args: Any) -> Any:
    kinds = [x.dtype for x in tensors]
    kind = functools.reduce(torch.promote_types, kinds)
    if all(own == kind for own in kinds):
        return NotImplemented
    return op([x.to(kind) for x in tensors], *args)


def operands_of_one_type(op: Callable[..., Any], *, floats: bool = False) -> Callable[..., Any]:
    """A rule for an op of two tensors: these in the type of the result; else left alone.

    Args:
        op: What is called.
        floats: Whether its result is of a float type, also where no operand is.
    """

    def rule(x: Tensor, y: Tensor) -> Any:
        kind = torch.result_type(x, y)
        if floats and not kind.is_floating_point:
            kind = torch.get_default_dtype()
        if x.dtype == y.dtype == kind:
            return NotImplemented
        return op(x.to(kind), y.to(kind))

    return rule
