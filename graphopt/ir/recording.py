"""What an op calls when it is decomposed, seen by a dispatch mode instead of a tracer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from typing_extensions import override

from graphopt.ir import torch_private
from graphopt.ir.torch_private import DispatchKey, FakeTensor, OpOverload, TorchDispatchMode

__all__ = ["Body", "NotRecordableError", "never_whole", "own_value", "recorded"]

Table = Mapping[Any, Callable[..., Any]]
_COMPOSED = DispatchKey.CompositeImplicitAutograd
_SAME_VALUE = ("aten::alias", "aten::detach")  # where nothing is trained or written


class NotRecordableError(Exception):
    """A decomposition does more than calling functional ops on the values that it is given."""


@dataclass(frozen=True)
class Body:
    """What stands for a call.

    Attributes:
        given: Placeholders for the call's operands, in the order of `all_input_nodes`.
        results: Place among the call's results (0 for a single tensor) → what gives it.
    """

    given: Sequence[fx.Node]
    results: Mapping[int, fx.Node]

    def calls(self) -> list[fx.Node]:
        """The calls that the results need, in order."""
        needed, open_ends = set(), list(self.results.values())
        while open_ends:
            node = open_ends.pop()
            if node.op == "call_function" and node not in needed:
                needed.add(node)
                open_ends += node.all_input_nodes
        first = next(iter(self.results.values()), None)
        return [] if first is None else [node for node in first.graph.nodes if node in needed]


def recorded(call: fx.Node, table: Table) -> Body | None:
    """What a call becomes where a table says how ops are decomposed.

    Args:
        call: Of an op whose operands and results are tensors of known sizes, with fake values in
            `meta["val"]`.
        table: Op → what replaces it. Composite ops that it does not name stay whole where they can.

    Returns:
        None where the call stays as it is.

    Raises:
        NotRecordableError: Something is written, a tensor appears from nowhere, or a rule fails.
    """
    operands = call.all_input_nodes
    values = [operand.meta["val"] for operand in operands] or [call.meta["val"]]
    fake = next(leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, FakeTensor))
    recorder = _Recorder(table)
    own = {node: own_value(node) for node in operands}
    given = [recorder.placeholder(own[operand]) for operand in operands]
    args, kwargs = fx.map_arg((call.args, call.kwargs), own.__getitem__)
    try:
        with torch.no_grad(), torch_private.below_autograd(), _portable(), fake.fake_mode:
            results = recorder.broken_up(call.target, args, kwargs)
    except NotRecordableError:
        raise
    except Exception as error:
        raise NotRecordableError(f"{call.target}: {error}") from error
    if results is NotImplemented:
        return None
    leaves = [results] if isinstance(results, Tensor) else list(results)
    found = {
        place: recorder.node_of(leaf)
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor)
    }
    return Body(given, found)


def own_value(node: fx.Node) -> Any:
    """What describes a node's value, in tensors of its own.

    Those that record tell tensors apart by identity, and nodes of one kind may share theirs.

    Args:
        node: With fake values in `meta["val"]`, if it has any.
    """
    return pytree.tree_map_only(Tensor, Tensor.detach, node.meta.get("val"))


def never_whole(op: Any) -> bool:
    """Whether torch breaks up an op whatever the table says: a composite one that gives a view."""
    if not isinstance(op, OpOverload) or not torch_private.is_composite(op):
        return False
    return not torch_private.may_stay_whole(op)


@contextmanager
def _portable() -> Iterator[None]:
    """Let composite ops call none of this machine's own kernels."""
    # not torch.backends.mkldnn.flags, which sets precisions, too, and warns of this build's
    enabled = torch_private.is_mkldnn_enabled()
    torch_private.enable_mkldnn(False)
    try:
        with torch.backends.nnpack.flags(enabled=False):
            yield
    finally:
        torch_private.enable_mkldnn(enabled)


def _kernel_of_autograd(op: Any) -> Callable[..., Any] | None:
    """What torch calls in Python before an op gets to what records; composite ops are not called at all."""
    kernel: Callable[..., Any] | None = op.py_kernels.get(DispatchKey.Autograd)
    composite = torch_private.has_kernel(op.name(), "CompositeImplicitAutograd")
    return None if composite else kernel


class _Recorder(TorchDispatchMode):
    """Writes down what is called, and decomposes what a table names."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self._table = table
        self._graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []  # so that no two tensors have one identity
        self._above = True  # calls come to autograd's kernels first, as those of rules do not

    def placeholder(self, value: Tensor) -> fx.Node:
        node = self._graph.placeholder(f"operand_{len(self._alive)}")
        node.meta["val"] = value
        self._keep(value, node)
        return node

    def node_of(self, value: Tensor) -> fx.Node:
        if id(value) not in self._nodes:
            raise NotRecordableError("a tensor of the rule's own")
        return self._nodes[id(value)]

    def broken_up(self, op: Any, args: Any, kwargs: Any) -> Any:
        """Results of the table's rule, or of the op's own composition; NotImplemented if it stays."""
        above = self._above
        # torch composes at once, by its own kernel, what can't be kept whole
        self._above = above and never_whole(op)
        rule = None if self._above else self._table.get(op)
        try:
            with self:
                return (rule or op.decompose)(*args, **kwargs)
        finally:
            self._above = above

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if func.namespace == "prim":  # what a tensor is of, not a value
            return func(*args, **kwargs)
        if func._schema.name in _SAME_VALUE:
            return args[0]
        kernel = _kernel_of_autograd(func)
        if kernel is not None and (self._above or _COMPOSED in func.py_kernels):
            with self:
                return kernel(*args, **kwargs)
        if func in self._table or never_whole(func):
            results = self.broken_up(func, args, kwargs)
            if results is not NotImplemented:
                return results
        if func._schema.is_mutable:
            raise NotRecordableError(f"{func} writes")
        taken = pytree.tree_map_only(Tensor, self.node_of, (tuple(args), dict(kwargs)))
        results = func(*args, **kwargs)
        node = self._graph.call_function(func, *taken)
        node.meta["val"] = results
        if isinstance(results, Tensor):
            self._keep(results, node)
            return results
        if not isinstance(results, tuple | list):
            raise NotRecordableError(f"{func} gives no tensor")
        for place, each in enumerate(results):
            if isinstance(each, Tensor):
                item = self._graph.call_function(operator.getitem, (node, place))
                item.meta["val"] = each
                self._keep(each, item)
        return results

    def _keep(self, value: Tensor, node: fx.Node) -> None:
        self._alive.append(value)
        self._nodes[id(value)] = node
