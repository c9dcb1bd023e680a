"""What computes the nodes of a graph: one at a time, a part of it, or all, with hooks in between.

Every run of a graph node by node is a use of it: all batches side by side (`run.layerwise`), a block
again and again (`run.block_forward`), what depends on a few weights (`run.partial_rerun`), gradients
and errors of single values (the hooks of `Interpreter.run`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.ir import op_info
from graphopt.ir.captured_module import CapturedModule, holder_of
from graphopt.ir.editor import operands
from graphopt.ir.state import state_nodes, writes
from graphopt.run.batches import Batch, explained, flat_inputs

__all__ = [
    "NO_HOOKS",
    "Call",
    "GraphWalk",
    "Hook",
    "Hooks",
    "Interpreter",
    "Value",
    "constant_value",
    "evaluate",
]

Hook = Callable[[Any], Any]
Value = Callable[[fx.Node], Any]  # the value of a node
Call = Callable[[fx.Node, Value], Any]  # computes a node from the values of what it reads


@dataclass(frozen=True)
class Hooks:
    """What becomes of values on their way through a graph.

    Attributes:
        before: Op → what becomes of its data input, its first argument that moves.
        behind: Node → what becomes of its value.
    """

    before: Mapping[fx.Node, Hook] = field(default_factory=dict)
    behind: Mapping[fx.Node, Hook] = field(default_factory=dict)


NO_HOOKS = Hooks()


def evaluate(gm: fx.GraphModule, node: fx.Node, value: Value, *, copies: bool = False) -> Any:
    """Compute one node of any kind but a placeholder.

    Args:
        gm: Holds tensors and submodules.
        node: The node.
        value: Values of what it reads.
        copies: An op that writes into what it reads gets copies, so that it may run again; of stored
            tensors it always does.
    """
    if node.op == "get_attr":
        holder, name = holder_of(gm, str(node.target))
        return getattr(holder, name)
    args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
    if node.op == "output":
        return args[0]
    target: Any = op_info.without_memory_order(node.target)
    if node.op == "call_module":
        target = gm.get_submodule(str(target))
    elif node.op == "call_method":
        return getattr(args[0], str(target))(*args[1:], **kwargs)
    if writes(node) and (copies or any(used.op == "get_attr" for used in operands(node))):
        args = pytree.tree_map_only(Tensor, Tensor.clone, args)
    return target(*args, **kwargs)


def constant_value(gm: fx.GraphModule, node: fx.Node) -> Any:
    """What a node computes from constants alone, from the tensors as they are now."""
    value = evaluate(gm, node, lambda used: constant_value(gm, used))
    return value.detach() if isinstance(value, Tensor) else value


class GraphWalk:
    """Computes nodes of one graph from given values.

    Args:
        gm: The graph; its tensors may change, its nodes must not.
        copies: Ops that write get copies: for graphs whose nodes run more than once.

    Attributes:
        nodes: All nodes in order.
        place: Node → its number.
        by_name: Name → node.
        constant: Nodes whose value is the same for all inputs.
        given: Nodes whose values a call brings: the placeholders, and the stored tensors that the
            graph writes.
        computed: The others, in order, the output node left out.
        last: Node → the last node that reads it, the output node included.
        output: The output node.
    """

    def __init__(self, gm: fx.GraphModule, *, copies: bool = False) -> None:
        self.gm, self.copies = gm, copies
        self.nodes: list[fx.Node] = list(gm.graph.nodes)
        self.place = {node: number for number, node in enumerate(self.nodes)}
        self.by_name = {node.name: node for node in self.nodes}
        (self.output,) = gm.graph.find_nodes(op="output")
        self.given: set[fx.Node] = {node for node in self.nodes if node.op == "placeholder"}
        self.given.update(node for node in state_nodes(gm) if node.op == "get_attr")
        self.computed = [n for n in self.nodes if n not in self.given and n.op != "output"]
        self.constant: set[fx.Node] = set()
        self.last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            used = operands(node)
            self.last.update(dict.fromkeys(used, node))
            fixed = bool(used) and all(operand in self.constant for operand in used)
            if node in self.given:
                continue
            if node.op == "get_attr" or (fixed and node.op != "output"):
                self.constant.add(node)

    def results(self) -> list[fx.Node]:
        """Nodes that the output reads."""
        return operands(self.output)

    def call(self, node: fx.Node, value: Value) -> Any:
        """Compute one node from the values of what it reads."""
        return evaluate(self.gm, node, value, copies=self.copies)

    def walk(
        self,
        nodes: Sequence[fx.Node],
        values: dict[fx.Node, Any],
        *,
        outside: Value | None = None,
        last: Mapping[fx.Node, fx.Node] | None = None,
        kept: Collection[fx.Node] = (),
        hooks: Hooks = NO_HOOKS,
        call: Call | None = None,
    ) -> None:
        """Compute nodes in order.

        Args:
            nodes: What to compute.
            values: What is known; values of `nodes` are added.
            outside: Values of what is neither known nor computed here.
            last: Node → its last reader among `nodes`, behind which its value is dropped, as are
                values that have no reader; None drops nothing.
            kept: What is not dropped.
            hooks: What becomes of values on their way.
            call: What computes one node, `Interpreter.call` by default.
        """
        compute = self.call if call is None else call
        value = values.__getitem__ if outside is None else _known_or(values, outside)
        for node in nodes:
            if node in hooks.before:
                moving = next(operand for operand in operands(node) if operand not in self.constant)
                result = compute(node, _with(value, moving, hooks.before[node](value(moving))))
            else:
                result = compute(node, value)
            values[node] = hooks.behind[node](result) if node in hooks.behind else result
            if last is None:
                continue
            for operand in operands(node):
                if last.get(operand) is node and operand not in kept:
                    values.pop(operand, None)
            if node not in last and node not in kept:
                del values[node]


class Interpreter(GraphWalk):
    """Computes a captured graph, or parts of it, on the inputs of calls.

    Args:
        gm: The graph; its tensors may change, its nodes must not.
        copies: Ops that write get copies: for graphs whose nodes run more than once.
    """

    gm: CapturedModule

    def __init__(self, gm: CapturedModule, *, copies: bool = False) -> None:
        super().__init__(gm, copies=copies)

    def inputs(self, batch: Batch) -> dict[fx.Node, Any]:
        """The values of `given` for one call; writing into them does no harm to the batch.

        State is as the call says (`StatefulCall`), or as it is stored now.

        Raises:
            InputError: The batch does not fit the captured call.
        """
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        given = dict(zip(placeholders, flat_inputs(self.gm, batch), strict=True))
        for node in placeholders:
            if not self.copies and any(writes(user) for user in node.users):
                given[node] = given[node].clone()
        start = getattr(batch, "state", None) or {}
        for node in self.given:
            if node.op == "get_attr":
                holder, name = holder_of(self.gm, str(node.target))
                given[node] = start.get(str(node.target), getattr(holder, name))
        return given

    def run(self, batch: Batch, behind: Mapping[fx.Node, Hook] | None = None) -> list[Any]:
        """Run all of the graph on one call.

        Args:
            batch: Inputs.
            behind: Node, placeholders included → what becomes of its value.

        Returns:
            What the output reads, in order.
        """
        values = self.inputs(batch)
        for node in values:
            if behind and node in behind:
                values[node] = behind[node](values[node])
        wanted = self.results()
        with explained(self.gm, batch):
            self.walk(
                self.computed,
                values,
                last=self.last,
                kept=set(wanted),
                hooks=Hooks(behind=behind or {}),
            )
        return [values[node] for node in wanted]


def _known_or(values: Mapping[fx.Node, Any], outside: Value) -> Value:
    return lambda node: values[node] if node in values else outside(node)


def _with(value: Value, changed: fx.Node, result: Any) -> Value:
    return lambda node: result if node is changed else value(node)
