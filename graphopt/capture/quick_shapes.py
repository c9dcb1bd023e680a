"""Sizes of what elementwise functions and norms give, without a trace of their decompositions.

Where sizes are open, torch finds them by running an op's Python decomposition on fake tensors: five ops
with symbolic strides for a batch norm, three for a ReLU. Their results are like their operand. And it asks
of every value in which of three memory layouts it lies, for metadata that nothing of an export reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from graphopt.exclusive import patched
from graphopt.ir import op_info, torch_private

__all__ = ["quick_shapes"]


@contextmanager
def quick_shapes() -> Iterator[None]:
    """Rules of torch's fake tensors for the ops that a network has most of, while it is exported."""
    rules: dict[Any, Callable[..., Any]] = torch_private.shape_rules()
    added = {op: rule for op, rule in _rules() if op not in rules}
    rules.update(added)
    tracing: Any = torch_private.tracing
    quick = _without_layouts(tracing._extract_tensor_metadata)
    try:
        with patched(tracing, _extract_tensor_metadata=quick):
            yield
    finally:
        for op in added:
            del rules[op]


def _without_layouts(described: Callable[..., Any]) -> Callable[..., Any]:
    """What describes a value, on this thread without its memory layout."""
    own = get_ident()

    def quick(value: Tensor, include_contiguity: bool = True) -> Any:
        return described(value, include_contiguity and get_ident() != own)

    return quick


def _rules() -> Iterator[tuple[Any, Callable[..., Any]]]:
    for op in op_info.targets(lambda info: info.activation is not None and info.kept_whole):
        if op in torch_private.decomposition_table:
            yield op, _rule_of(op)
    yield op_info.BATCH_NORM, _batch_norm


def _rule_of(op: Any) -> Callable[..., Any]:
    def elementwise(mode: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _is_plain(x):
            return _by_torch(op, mode, (x, *args), kwargs)
        return _like(mode, x)

    return elementwise


def _batch_norm(mode: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    others = [given for given in args if isinstance(given, Tensor)]
    if not _is_plain(x) or any(given.dtype is not x.dtype for given in others):
        return _by_torch(op_info.BATCH_NORM, mode, (x, *args), kwargs)
    return _like(mode, x), _empty(mode, x), _empty(mode, x)


def _is_plain(x: Tensor) -> bool:
    """Whether the result has the operand's type and strides."""
    return x.is_floating_point() and bool(
        torch_private.contiguous_for_sure(x, memory_format=torch.contiguous_format)
    )


def _by_torch(op: Any, mode: Any, args: Any, kwargs: Any) -> Any:
    with mode:
        return torch_private.decomposition_table[op](*args, **kwargs)


def _like(mode: Any, x: Tensor) -> Tensor:
    with torch_private.in_kernel(mode):
        meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return torch_private.FakeTensor(mode, meta, x.device)


def _empty(mode: Any, x: Tensor) -> Tensor:
    with torch_private.in_kernel(mode):
        meta = torch.empty((0,), dtype=x.dtype, device="meta")
    return torch_private.FakeTensor(mode, meta, x.device)
