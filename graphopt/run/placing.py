"""A graph and the inputs of its calls on a device, for as long as something runs there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphopt.ir.captured_module import CapturedModule, holder_of
from graphopt.run.batches import Batch, StatefulCall

__all__ = ["batch_on", "device_of_graph", "placed"]


def device_of_graph(gm: fx.GraphModule) -> torch.device:
    """Where a graph's tensors are, by the first of them; the CPU where there is none."""
    tensors = (*gm.parameters(), *gm.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def batch_on(batch: Batch, device: torch.device | None) -> Batch:
    """Inputs of one call, and the state that it starts from, on a device; None leaves them."""
    if device is None:
        return batch

    def moved(values: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), values)

    args, kwargs = moved(tuple(batch)) if isinstance(batch, StatefulCall) else moved(batch)
    if not isinstance(batch, StatefulCall):
        return args, kwargs
    state = batch.state
    return StatefulCall((args, kwargs), None if state is None else moved(dict(state)))


@contextmanager
def placed(gm: CapturedModule, device: torch.device | None) -> Iterator[None]:
    """Hold a graph's tensors on a device, and let ops that name one name that.

    Afterwards all is back where it was: tensors that nobody has replaced are the ones from before,
    others are moved. Tensors that are tied stay so. None leaves everything where it is.

    Args:
        gm: The graph; nobody else may use it meanwhile.
        device: Where its values are to be computed.
    """
    if device is None:
        yield
        return
    held = {
        path: tensor
        for tensors in (gm.named_parameters, gm.named_buffers)
        for path, tensor in tensors(remove_duplicate=False)
    }
    there = _moved(held, device)
    for path, tensor in there.items():
        _hold(gm, path, tensor)
    calls = _naming_others(gm, device)
    for node, (args, kwargs) in calls.items():
        node.args, node.kwargs = _naming(args, device), _naming(kwargs, device)
    try:
        yield
    finally:
        for node, (args, kwargs) in calls.items():
            node.args, node.kwargs = args, kwargs
        for path, tensor in held.items():
            holder, name = holder_of(gm, path)
            now = getattr(holder, name)
            _hold(gm, path, tensor if now is there[path] else _same_kind(now, tensor.device))


def _moved(held: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    known: dict[int, Tensor] = {}
    for tensor in held.values():
        if id(tensor) not in known:
            known[id(tensor)] = _same_kind(tensor, device)
    return {path: known[id(tensor)] for path, tensor in held.items()}


def _same_kind(tensor: Tensor, device: torch.device) -> Tensor:
    """A parameter or a buffer on a device; itself where it is there."""
    if tensor.device == device:
        return tensor
    moved = tensor.detach().to(device)
    kept = isinstance(tensor, nn.Parameter)
    return nn.Parameter(moved, tensor.requires_grad) if kept else moved


def _hold(gm: fx.GraphModule, path: str, tensor: Tensor) -> None:
    holder, name = holder_of(gm, path)
    if isinstance(tensor, nn.Parameter):
        holder.register_parameter(name, tensor)
    else:
        holder._buffers[name] = tensor


def _naming_others(gm: fx.GraphModule, device: torch.device) -> dict[fx.Node, tuple[Any, Any]]:
    """Calls that name other devices → their arguments."""
    return {
        node: (node.args, node.kwargs)
        for node in gm.graph.nodes
        if any(
            isinstance(leaf, torch.device) and leaf != device
            for leaf in pytree.tree_leaves((node.args, node.kwargs))
        )
    }


def _naming(arguments: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(torch.device, lambda _: device, arguments)
