"""What adding up in 16 bits, one term behind the other, does to products of matrices and convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.ir import op_info

__all__ = ["NarrowSums"]

# standard deviation of an addition's rounding, of the sum so far
_ADDITION = {torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}


class NarrowSums:
    """Errors of products whose terms are added up in 16 bits, in PyTorch.

    Each of n additions rounds the sum so far, S, with an error of standard deviation u·S, about; u is
    2⁻¹² in float16, 2⁻⁹ in bfloat16. For terms of any sign S² grows to the sum of their squares, q²;
    for terms of one sign S grows to the result, y. So the variance of the result is u² times
    n/2·q² + n/3·y².

    Args:
        families: Of ops that add up so.
        kind: Float type that they add up in.
    """

    def __init__(self, families: Collection[str], kind: torch.dtype = torch.float16) -> None:
        self._families = families
        self._unit = _ADDITION[kind]
        self._generator = torch.Generator().manual_seed(0)

    def concerns(self, node: fx.Node) -> bool:
        """Whether an op adds up so."""
        info = op_info.info_of(node)
        return info is not None and bool({*info.names} & {*self._families})

    def behind(self, node: fx.Node, result: Tensor, read: Callable[[fx.Node], Any]) -> Tensor:
        """A result with the errors of its additions.

        Args:
            node: The op.
            result: What it gives, in float32.
            read: Values of its operands.
        """
        info = op_info.info_of(node)
        assert info is not None
        args: list[Any] = [*fx.map_arg(node.args, read)]
        kwargs: dict[str, Any] = {**fx.map_arg(node.kwargs, read)}
        call: Callable[..., Tensor] = node.target  # type: ignore[assignment]
        if len(info.data) == 3:  # attention, whose weights are of one sign
            _, key, value = info.data
            terms = args[key].shape[-2]
            args[value] = args[value].abs()
            spread = call(*args, **kwargs) * math.sqrt(terms / 3)
        else:
            terms = _terms(info, args)
            squares = pytree.tree_map_only(Tensor, torch.square, args)
            total = call(*squares, **kwargs).abs()
            spread = (total * terms / 2 + result.square() * terms / 3).sqrt()
        noise = torch.randn(result.shape, generator=self._generator, dtype=result.dtype)
        return result + self._unit * spread * noise


def _terms(info: op_info.OpInfo, args: Sequence[Any]) -> int:
    """How many products are added up for one value."""
    if info.convolution is None:
        return int(args[info.data[0]].shape[-1])
    slot = info.weights[0]
    weight = args[slot.position]
    return int(weight.numel() // weight.shape[slot.channel_axis])
