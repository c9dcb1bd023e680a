"""Run a graph op by op over all calibration batches at once.

Where a fit of one layer needs the outputs of the layers before it in their compressed form, one
such walk replaces a forward pass per layer: values live until their last reader has run, and what
depends on constants alone is computed when it is read, so that a weight changed on the way counts
for everything behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import operands
from graphopt.run.activation_store import ActivationStore
from graphopt.run.batches import Batch, explained
from graphopt.run.interpreter import Interpreter, constant_value

__all__ = ["LayerwiseRun"]


class LayerwiseRun:
    """Values of one graph for several batches, node by node.

    Args:
        gm: The graph; constants may be replaced between two steps.
        batches: Calibration inputs, one call each.
        store: What holds values; several runs may share one. None keeps all in memory.

    Attributes:
        interpreter: What computes its nodes.
        count: Number of batches.
    """

    def __init__(
        self,
        gm: CapturedModule,
        batches: Sequence[Batch],
        store: ActivationStore | None = None,
    ) -> None:
        self.store = ActivationStore() if store is None else store
        self.gm = gm
        self.interpreter = Interpreter(gm)
        self._batches = batches
        self.count = len(batches)
        self._done: set[fx.Node] = set()
        self._unread = {node: len(node.users) for node in gm.graph.nodes}
        given = [self.interpreter.inputs(batch) for batch in batches]
        self._values: dict[fx.Node, list[Any]] = {
            node: [inputs[node] for inputs in given] for node in self.interpreter.given
        }
        self.store.hold(list(self._values.values()))

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a node's value is the same for all inputs."""
        return node in self.interpreter.constant

    def constant(self, node: fx.Node) -> Any:
        """Value of a constant node, computed from the tensors as they are now."""
        return constant_value(self.gm, node)

    def values(self, node: fx.Node) -> list[Any]:
        """A node's value for each batch; the node must have run and still have readers."""
        if self.is_constant(node):
            return [self.constant(node)] * self.count
        return self._values[node]

    def has_values(self, node: fx.Node) -> bool:
        """Whether values of a node are at hand, so that they can be replaced."""
        return node in self._values

    def set_values(self, node: fx.Node, values: list[Any]) -> None:
        """Let the readers of a node see other values."""
        self.store.dropped(self._values.get(node, ()))
        self._values[node] = [self.store.kept(value) for value in values]

    def has_run(self, node: fx.Node) -> bool:
        """Whether a node's values are known, or need not be."""
        return node in self._done or node in self.interpreter.given or self.is_constant(node)

    @torch.no_grad()
    def step(self, node: fx.Node, *, keep_inputs: bool = False) -> None:
        """Run one node on all batches and drop what nobody reads any more.

        Args:
            node: The next node of the graph.
            keep_inputs: Keep what it reads, because it will run again.
        """
        if node in self.interpreter.given or self.is_constant(node):
            return
        self._done.add(node)
        used = set(operands(node))
        fixed = {operand: self.constant(operand) for operand in used if self.is_constant(operand)}
        results = []
        for number in range(self.count):
            given = {
                operand: self._values[operand][number] for operand in used if operand not in fixed
            }
            with explained(self.gm, self._batches[number]):
                made = self.interpreter.call(node, {**fixed, **given}.__getitem__)
            results.append(self.store.kept(made))
            self.store.rest(given.values())
        self._values[node] = results
        if keep_inputs:
            return
        for operand in used:
            self._unread[operand] -= 1
            if not self._unread[operand] and operand not in fixed:
                self.store.dropped(self._values.pop(operand))
