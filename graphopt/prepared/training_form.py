"""What a prepared graph needs to know of its model before it trains as the model does."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from graphopt.capture.training_calls import training_calls
from graphopt.errors import StateError
from graphopt.ir import op_info
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import Editor
from graphopt.ir.module_frames import module_frames
from graphopt.prepared.conv_norm import ConvNorm
from graphopt.prepared.dropout import DropoutInside, TrainableDropout
from graphopt.prepared.norm import TrainableNorm
from graphopt.prepared.origin import QUANTIZERS

__all__ = ["train_as_model"]

_log = logging.getLogger(__name__)


def train_as_model(
    prepared: CapturedModule, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Give attention the dropout, and batch norms the momentum, that they have in the model.

    A graph captured in evaluation says neither: attention has no dropout there, and a momentum of 0
    may stand for the mean over all batches. Nor has it a place for what the model draws in training
    alone, such as stochastic depth and added noise: that is refused.

    Args:
        prepared: The graph, with `RestoreTraining` run.
        model: What it was captured from.
        args: Inputs that it was captured with.
        kwargs: Keyword inputs of that call.

    Raises:
        StateError: The model has attention and cannot be run in training, or draws what the graph has
            no place for.
    """
    _set_momenta(prepared, model)
    attention = [part for part in _called(prepared, DropoutInside) if part.switch is None]
    depends = bool(attention) or any(isinstance(m, nn.MultiheadAttention) for m in model.modules())
    try:
        seen = training_calls(model, args, kwargs)
    except StateError as error:
        if depends:
            raise
        _log.warning("training_mode() knows the dropouts of the graph alone: %s", error)
        return
    weighted = [node for node in prepared.graph.nodes if _is_attention_weight(node)]
    for rates, places in ((seen.attention, attention), (seen.weighted, weighted)):
        if any(rates) and len(rates) != len(places):
            raise StateError(
                f"{type(model).__name__} calls attention {len(rates)} times in training and"
                f" {len(places)} times in evaluation: training_mode() cannot tell which of them drops"
                " what; set its rate to 0 to train without"
            )
    lost = seen.dropouts - _dropouts(prepared)
    if lost:
        (kind, rate), number = next(iter(lost.items()))
        raise StateError(
            f"{type(model).__name__} has {number} calls of {kind} with rate {rate:g} in training that"
            " evaluation leaves out, so that training_mode() has no place for them: call them in both,"
            " with training=self.training, or set the rate to 0 to train without"
        )
    for (kind, owner), number in seen.draws.items():
        place = f" ({owner})" if owner else ""
        raise StateError(
            f"{type(model).__name__}{place} calls {kind} {number} times in training alone, as stochastic"
            " depth and added noise do, so that training_mode() has no place for it: switch it off in"
            " the model to train without, or train the model before it is prepared"
        )
    for part, rate in zip(attention, seen.attention, strict=False):
        part.rate = rate
    edit = Editor(prepared)
    for node, rate in zip(weighted, seen.weighted, strict=False):
        path = edit.module(f"{QUANTIZERS}.dropout_{node.name}", TrainableDropout(rate, "dropout"))
        edit.redirect(
            node, edit.run_module(path, node, place=node.next, like=node), lambda _: False
        )
    prepared.recompile()


def _is_attention_weight(node: fx.Node) -> bool:
    """Whether a node gives the weights of a `nn.MultiheadAttention`."""
    info = op_info.info_of(node)
    if info is None or info.attention != "softmax":
        return False
    frames = module_frames(node)
    return bool(frames) and frames[-1].type.rpartition(".")[2] == "MultiheadAttention"


def _called(prepared: CapturedModule, kind: type[Any]) -> list[Any]:
    """The submodules of a kind, in the order of their calls."""
    nodes = prepared.graph.find_nodes(op="call_module")
    parts = (prepared.get_submodule(str(node.target)) for node in nodes)
    return [part for part in parts if isinstance(part, kind)]


def _dropouts(prepared: CapturedModule) -> Counter[tuple[str, float]]:
    plain = [("dropout", part.p) for part in _called(prepared, nn.Dropout)]
    others = [(part.kind, part.rate) for part in _called(prepared, TrainableDropout)]
    return Counter([*plain, *others])


def _set_momenta(prepared: CapturedModule, model: nn.Module) -> None:
    for node in prepared.graph.find_nodes(op="call_module"):
        part = prepared.get_submodule(str(node.target))
        if not isinstance(part, TrainableNorm | ConvNorm) or part.momentum is not None:
            continue
        owners = (str(used.target).rpartition(".") for used in node.all_input_nodes)
        owner = next((path for path, _, name in owners if name == op_info.TRACKED), None)
        own = None if owner is None else _submodule(model, owner)
        if getattr(own, "momentum", None) == 0:
            part.momentum = 0.0


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
