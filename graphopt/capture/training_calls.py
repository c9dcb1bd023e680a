"""What a model draws in training where the graph, captured in evaluation, no longer says so."""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from graphopt.capture.exporting import buffers_restored, run_on_copies
from graphopt.errors import StateError
from graphopt.ir.torch_private import AnyBatchNorm

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
_DRAWS = frozenset(
    (
        *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm"),
        *("bernoulli", "normal", "multinomial", "poisson", "binomial", "uniform", "exponential"),
        *("geometric", "cauchy", "log_normal", "random", "gumbel_softmax"),
    )
)
_PYTHON, _NUMPY = "Python's random", "numpy.random"
_NORMS = AnyBatchNorm  # of which some take no batch of one in training


@dataclass
class TrainingCalls:
    """What one call of a model in training has dropped.

    Attributes:
        attention: Rate of each fused attention, in order.
        weighted: Rate of each attention of `nn.MultiheadAttention` that gives its weights, in order.
        dropouts: (op, rate) → number of its dropouts.
        draws: (function, name of the module that calls it) → number of its other random numbers.
    """

    attention: list[float] = field(default_factory=list)
    weighted: list[float] = field(default_factory=list)
    dropouts: Counter[tuple[str, float]] = field(default_factory=Counter)
    draws: Counter[tuple[str, str]] = field(default_factory=Counter)


def training_calls(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> TrainingCalls:
    """Run a model once in training, on the inputs it was captured with, and see what it draws.

    Where it draws more than dropouts, it is run in evaluation, too, and `draws` has what training adds.
    The model's modes and buffers, the inputs and the random states are as before afterwards.

    Raises:
        StateError: It cannot be run in training on these inputs.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        seen = _seen(model, args, kwargs, training=True)
        if seen.draws:
            seen.draws -= _seen(model, args, kwargs, training=False).draws
    except Exception as error:
        raise StateError(
            f"what {type(model).__name__} draws in training only a call in training shows, and it fails"
            f" on the example inputs in training: {type(error).__name__}: {error}; prepare it with an"
            " example that it can be trained on"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    return seen


def _seen(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, training: bool
) -> TrainingCalls:
    seen = TrainingCalls()
    for module in model.modules():
        module.training = training and not isinstance(module, _NORMS)
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with buffers_restored(model), torch.no_grad(), _path_of(model) as path, _Watch(seen, path):
            run_on_copies(model, tuple(args), dict(kwargs))
        if random.getstate() != python:
            seen.draws[_PYTHON, ""] += 1
        if str(np.random.get_state()) != str(numpy):
            seen.draws[_NUMPY, ""] += 1
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
    return seen


@contextmanager
def _path_of(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules that are being called, the innermost last."""
    path = [""]
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: path.append(name)))
        handles.append(
            module.register_forward_hook(lambda *_: [path.pop(), None][1], always_call=True)
        )
    try:
        yield path
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    """Notes the functions whose names it knows; it does not see what they call in turn."""

    def __init__(self, seen: TrainingCalls, path: Sequence[str]) -> None:
        super().__init__()
        self.seen, self.path = seen, path

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
        elif name in _DRAWS:
            self.seen.draws[name, self.path[-1]] += 1
        return func(*args, **given)

    def _dropout(self, op: str, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        if getattr(func, "__module__", None) == F.__name__:
            call = inspect.signature(func).bind(*args, **kwargs)
            call.apply_defaults()
            rate, training = call.arguments["p"], call.arguments["training"]
        else:
            rate, training = (*args[1:], *kwargs.values())[:2]
        if training and rate:
            self.seen.dropouts[op, float(rate)] += 1

    def _many_heads(self, call: inspect.BoundArguments) -> None:
        call.apply_defaults()
        given = call.arguments
        rate = float(given["dropout_p"]) if given["training"] else 0.0
        calls = self.seen.weighted if given["need_weights"] else self.seen.attention
        calls.append(rate)
