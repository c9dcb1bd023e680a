"""Run a graph op by op over all calibration batches at once.

Where a fit of one layer needs the outputs of the layers before it in their compressed form, one
such walk replaces a forward pass per layer: values live until their last reader has run, and what
depends on constants alone is computed when it is read, so that a weight changed on the way counts
for everything behind it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.errors import InputError
from graphopt.ir.captured_module import CapturedModule, InputGuards, holder_of
from graphopt.ir.editor import operands

__all__ = ["Batch", "LayerwiseRun", "as_batch", "flat_inputs"]

Batch = tuple[tuple[Any, ...], dict[str, Any]]


def as_batch(inputs: Any) -> Batch:
    """Inputs of one call: a tensor, a tuple or list of positional ones, or a dict of keyword ones."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def flat_inputs(gm: CapturedModule, batch: Batch) -> list[Any]:
    """The values of the graph's placeholders for one call.

    Raises:
        InputError: The structure differs from the captured one.
    """
    try:
        given = inspect.signature(gm.forward).bind(*batch[0], **batch[1]).arguments
    except TypeError as error:
        raise InputError(f"calibration inputs do not fit the captured call: {error}") from None
    info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]
    positional, keyword = info.in_spec.children()
    names, count = info.orig_args, positional.num_children
    by_name = {name: given[name] for name in keyword.context}
    leaves, spec = pytree.tree_flatten((tuple(given[name] for name in names[:count]), by_name))
    if spec != info.in_spec:
        raise InputError(
            f"calibration inputs do not fit the captured call: {spec}, captured {info.in_spec}"
        )
    return leaves


@contextmanager
def explained(gm: CapturedModule, batch: Batch) -> Iterator[None]:
    """Say of inputs with which an op fails that the graph was captured for other sizes, if it was.

    Raises:
        InputError: In the place of the op's own error.
    """
    try:
        yield
    except RuntimeError:
        for guard in gm._forward_pre_hooks.values():
            if isinstance(guard, InputGuards):
                guard(gm, *batch)
        raise


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


class LayerwiseRun:
    """Values of one graph for several batches, node by node.

    Args:
        gm: The graph; constants may be replaced between two steps.
        batches: Calibration inputs, one call each.
    """

    def __init__(self, gm: CapturedModule, batches: Sequence[Batch]) -> None:
        self.gm = gm
        self._values: dict[fx.Node, list[Any]] = {}
        self._count = len(batches)
        self._readers = {node: len(node.users) for node in gm.graph.nodes}
        self._constant: set[fx.Node] = set()
        self._done: set[fx.Node] = set()
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                self._constant.add(node)
            elif node.op in ("call_function", "call_method", "call_module"):
                used = operands(node)
                if used and all(each in self._constant for each in used):
                    self._constant.add(node)
        placeholders = gm.graph.find_nodes(op="placeholder")
        self._batches = batches
        flat = [flat_inputs(gm, batch) for batch in batches]
        for place, node in enumerate(placeholders):
            values = [inputs[place] for inputs in flat]
            if any(_writes(user) for user in node.users):
                values = [value.clone() for value in values]
            self._values[node] = values

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a node's value is the same for all inputs."""
        return node in self._constant

    def constant(self, node: fx.Node) -> Any:
        """Value of a constant node, computed from the tensors as they are now."""
        if node.op == "get_attr":
            holder, name = holder_of(self.gm, str(node.target))
            return getattr(holder, name)
        return self.call(node, {each: self.constant(each) for each in operands(node)})

    def values(self, node: fx.Node) -> list[Any]:
        """A node's value for each batch; the node must have run and still have readers."""
        if node in self._constant:
            return [self.constant(node)] * self._count
        return self._values[node]

    def set_values(self, node: fx.Node, values: list[Any]) -> None:
        """Let the readers of a node see other values."""
        self._values[node] = values

    def has_run(self, node: fx.Node) -> bool:
        """Whether a node's values are known, or need not be."""
        return node in self._done or node.op == "placeholder" or node in self._constant

    @torch.no_grad()
    def step(self, node: fx.Node, *, keep_inputs: bool = False) -> None:
        """Run one node on all batches and drop what nobody reads any more.

        Args:
            node: The next node of the graph.
            keep_inputs: Keep what it reads, because it will run again.
        """
        if node.op == "placeholder" or node in self._constant:
            return
        self._done.add(node)
        used = set(operands(node))
        fixed = {each: self.constant(each) for each in used if each in self._constant}
        results = []
        for number in range(self._count):
            given = {each: self._values[each][number] for each in used if each not in fixed}
            with explained(self.gm, self._batches[number]):
                results.append(self.call(node, {**fixed, **given}))
        self._values[node] = results
        if keep_inputs:
            return
        for each in used:
            self._readers[each] -= 1
            if not self._readers[each] and each not in fixed:
                del self._values[each]

    def call(self, node: fx.Node, given: Mapping[fx.Node, Any]) -> Any:
        """Compute one node from the values of what it reads."""
        args = fx.map_arg(node.args, given.__getitem__)
        kwargs = fx.map_arg(node.kwargs, given.__getitem__)
        if node.op == "output":
            return args[0]
        target: Any = node.target
        if node.op == "call_module":
            target = self.gm.get_submodule(str(target))
        elif node.op == "call_method":
            return getattr(args[0], str(target))(*args[1:], **kwargs)
        return target(*args, **kwargs)
