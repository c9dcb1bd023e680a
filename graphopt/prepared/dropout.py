"""Dropouts of an exported graph, with their training behaviour."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

__all__ = ["DropoutInside", "TrainableDropout"]


class TrainableDropout(nn.Module):
    """A dropout of whole features, or one that keeps mean and variance.

    Attributes:
        rate: Share of what is dropped.
        kind: Its op, as "feature_dropout" or "alpha_dropout".
    """

    def __init__(self, rate: float, kind: str) -> None:
        super().__init__()
        self.rate, self.kind = rate, kind

    def forward(self, x: Tensor) -> Tensor:
        """`x`; in training with some of it dropped."""
        op = getattr(torch, self.kind)
        dropped: Tensor = op(x, self.rate, self.training)
        return dropped

    @override
    def extra_repr(self) -> str:
        return f"{self.kind}, rate={self.rate:g}"


class DropoutInside(nn.Module):
    """An op that drops something on its way, as attention and recurrent layers do.

    Attributes:
        op: Its name, as "aten.lstm.input".
        rate: Share of what is dropped in training.
        place: Place of the rate among the arguments.
        switch: Place of the switch to training, None where the rate alone decides.
    """

    def __init__(self, op: str, rate: float, place: int, switch: int | None) -> None:
        super().__init__()
        self.op, self.rate, self.place, self.switch = op, rate, place, switch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the op gives; in training with some of it dropped."""
        target: Any = torch.ops
        for part in self.op.split("."):
            target = getattr(target, part)
        given = list(args)
        if self.training and self.rate > 0:
            defaults = [argument.default_value for argument in target._schema.arguments]
            given += defaults[len(given) : self.place + 1]
            given[self.place] = self.rate
            if self.switch is not None:
                given[self.switch] = True
        return target(*given, **kwargs)

    @override
    def extra_repr(self) -> str:
        return f"{self.op}, rate={self.rate:g}"
