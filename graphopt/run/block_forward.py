"""Run one block of a graph again and again, with other values for the constants that it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from graphopt.analysis.partition import Block
from graphopt.ir.editor import operands
from graphopt.run.interpreter import Call
from graphopt.run.layerwise import LayerwiseRun

__all__ = ["BlockForward"]


class BlockForward:
    """The nodes of a block as a function of its constants, for the batches of a layer-wise run.

    Args:
        run: A run that has come to the block: what the block reads from before is known.
        block: The block.

    Attributes:
        inputs: Values from before the block.
        constants_read: Constants that the block reads, directly or through ops on constants, in the
            order of the graph.
    """

    def __init__(self, run: LayerwiseRun, block: Block) -> None:
        self.run, self.block = run, block
        inside = set(block.nodes)
        self.inputs = {
            operand
            for node in block.nodes
            if not run.is_constant(node)
            for operand in operands(node)
            if operand not in inside and not run.is_constant(operand)
        }
        constants: set[fx.Node] = set()
        pending = [node for node in block.nodes if not run.is_constant(node)]
        while pending:
            for operand in operands(pending.pop()):
                if run.is_constant(operand) and operand not in constants:
                    constants.add(operand)
                    pending.append(operand)
        self.constants_read = [node for node in run.gm.graph.nodes if node in constants]
        self._known = {node: run.values(node) for node in self.inputs}

    def constants(
        self,
        given: Mapping[str, Tensor],
        computed: Mapping[fx.Node, Callable[[dict[fx.Node, Any]], Any]] | None = None,
    ) -> dict[fx.Node, Any]:
        """Values of the constants, once for a step.

        Args:
            given: Name of a stored tensor → what takes its place, cast to the stored type.
            computed: Node → how it is computed from the constants before it.
        """
        values: dict[fx.Node, Any] = {}
        for node in self.constants_read:
            if computed is not None and node in computed:
                values[node] = computed[node](values)
            elif node.op == "get_attr":
                stored, other = self.run.constant(node), given.get(str(node.target))
                values[node] = stored if other is None else other.to(stored.dtype)
            else:
                values[node] = self.run.interpreter.call(node, values.__getitem__)
        return values

    def __call__(
        self,
        constants: Mapping[fx.Node, Any],
        number: int,
        call: Call | None = None,
    ) -> list[Tensor]:
        """Outputs of the block for one batch.

        Args:
            constants: From `constants`.
            number: Number of the batch.
            call: What computes one node from the values before it; None runs it.
        """
        values = dict(constants)
        known = {node: each[number] for node, each in self._known.items()}
        values |= known
        nodes = [
            node
            for node in self.block.nodes
            if node not in values and not self.run.is_constant(node)
        ]
        self.run.interpreter.walk(nodes, values, call=call)
        self.run.store.rest(known.values())
        return [values[node] for node in self.block.outputs]
