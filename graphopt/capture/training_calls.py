"""What a model drops in training where the graph, captured in evaluation, no longer says so."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from graphopt.capture.capture import buffers_restored, run_on_copies
from graphopt.errors import StateError

__all__ = ["TrainingCalls", "training_calls"]

# function → op
_DROPOUTS = {
    "dropout": "dropout",
    "dropout1d": "feature_dropout",
    "dropout2d": "feature_dropout",
    "dropout3d": "feature_dropout",
    "feature_dropout": "feature_dropout",
    "alpha_dropout": "alpha_dropout",
    "feature_alpha_dropout": "feature_alpha_dropout",
}


@dataclass
class TrainingCalls:
    """What one call of a model in training has dropped.

    Attributes:
        attention: Rate of each fused attention, in order.
        weighted: Rate of each attention of `nn.MultiheadAttention` that gives its weights, in order.
        dropouts: (op, rate) → number of its dropouts.
    """

    attention: list[float] = field(default_factory=list)
    weighted: list[float] = field(default_factory=list)
    dropouts: Counter[tuple[str, float]] = field(default_factory=Counter)


def training_calls(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> TrainingCalls:
    """Run a model once in training, on the inputs it was captured with, and see what it drops.

    The model's modes and buffers, the inputs and the random state are as before afterwards.

    Raises:
        StateError: It cannot be run in training on these inputs.
    """
    seen = TrainingCalls()
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = True
        with buffers_restored(model), torch.no_grad(), _Watch(seen):
            run_on_copies(model, tuple(args), dict(kwargs))
    except Exception as error:
        raise StateError(
            f"{type(model).__name__} has attention, whose dropout only a call in training shows, and"
            f" fails on the example inputs in training: {type(error).__name__}: {error}; prepare it"
            " with an example that it can be trained on"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    return seen


class _Watch(TorchFunctionMode):
    """Notes the functions whose names it knows; it does not see what they call in turn."""

    def __init__(self, seen: TrainingCalls) -> None:
        super().__init__()
        self.seen = seen

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        name = str(getattr(func, "__name__", "")).rstrip("_")
        if name == "scaled_dot_product_attention":
            self.seen.attention.append(
                float(args[4] if len(args) > 4 else given.get("dropout_p", 0))
            )
        elif func is F.multi_head_attention_forward:
            self._many_heads(inspect.signature(func).bind(*args, **given))
        elif name in _DROPOUTS:
            self._dropout(_DROPOUTS[name], func, args, given)
        return func(*args, **given)

    def _dropout(self, op: str, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        if getattr(func, "__module__", None) == F.__name__:
            call = inspect.signature(func).bind(*args, **kwargs)
            call.apply_defaults()
            rate, training = call.arguments["p"], call.arguments["training"]
        else:
            rate, training = (*args[1:], *kwargs.values())[:2]
        if training:
            self.seen.dropouts[op, float(rate)] += 1

    def _many_heads(self, call: inspect.BoundArguments) -> None:
        call.apply_defaults()
        given = call.arguments
        rate = float(given["dropout_p"]) if given["training"] else 0.0
        calls = self.seen.weighted if given["need_weights"] else self.seen.attention
        calls.append(rate)
