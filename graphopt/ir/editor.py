"""Editor: the only way to change a graph; it records whether anything changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.ir import op_info
from graphopt.ir.annotations import note, record
from graphopt.ir.captured_module import holder_of
from graphopt.ir.decoded_tensor import fake_of
from graphopt.ir.records import ActivationRecord, TensorRecord
from graphopt.ir.state import state_nodes
from graphopt.ir.torch_private import FakeTensor, FakeTensorMode, OpOverload, open_size_kernels

__all__ = ["ORIGIN", "Editor", "nodes_in", "operands"]

# metadata that says where a node comes from
ORIGIN = ("nn_module_stack", "stack_trace", "torch_fn", "source_fn_stack")


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes in a node's arguments, in order and with repetitions."""
    return nodes_in((node.args, node.kwargs))


def nodes_in(arguments: Any) -> list[fx.Node]:
    """The nodes in arguments of any nesting, in order and with repetitions."""
    nodes: list[fx.Node] = []

    def note(used: fx.Node) -> fx.Node:
        nodes.append(used)
        return used

    fx.map_arg(arguments, note)
    return nodes


class Editor:
    """Edits of one graph module.

    Attributes:
        gm: The module being edited.
        changed: Whether an edit happened.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.changed = False
        self._fake_mode = _fake_mode_of(gm.graph)

    def constants(self) -> Iterator[fx.Node]:
        """The `get_attr` nodes of tensors, as a list that edits do not disturb; bodies of control flow are none."""
        yield from [
            node for node in self.gm.graph.find_nodes(op="get_attr") if self._holds_tensor(node)
        ]

    def _holds_tensor(self, node: fx.Node) -> bool:
        holder, name = holder_of(self.gm, str(node.target))
        return isinstance(getattr(holder, name), Tensor)

    def calls(self, *targets: Callable[..., Any]) -> Iterator[fx.Node]:
        """The nodes that call one of `targets`, in order."""
        for node in list(self.gm.graph.nodes):
            if node.op == "call_function" and node.target in targets:
                yield node

    def value(self, node: fx.Node) -> Tensor:
        """The tensor behind a `get_attr` node."""
        holder, name = holder_of(self.gm, str(node.target))
        tensor = getattr(holder, name)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{node.target} is no tensor")
        return tensor

    def constant(
        self,
        name: str,
        value: Tensor,
        *,
        like: fx.Node,
        before: fx.Node | None = None,
        trained: bool = False,
    ) -> fx.Node:
        """Add a persistent buffer under dotted `name` (made unique) and its node before `like`.

        Args:
            name: Wanted name.
            value: Its value.
            like: Node whose place and origin the new one takes.
            before: Another place.
            trained: Add a parameter instead.
        """
        path, number = name, 0
        while self._exists(path):
            number += 1
            path = f"{name}_{number}"
        holder, attribute = holder_of(self.gm, path, create=True)
        if trained:
            holder.register_parameter(attribute, nn.Parameter(value))
        else:
            holder.register_buffer(attribute, value)
        with self.gm.graph.inserting_before(before or like):
            node = self.gm.graph.get_attr(path)
        self._inherit(node, like)
        node.meta["val"] = self.fake(value)
        self.changed = True
        return node

    def stored(self, path: str, *, like: fx.Node) -> fx.Node | None:
        """A node before `like` for a tensor that the module has already; None where it has none."""
        if not self._exists(path):
            return None
        with self.gm.graph.inserting_before(like):
            node = self.gm.graph.get_attr(path)
        self._inherit(node, like)
        node.meta["val"] = self.fake(self.value(node))
        self.changed = True
        return node

    def call(
        self,
        target: Callable[..., Any],
        *args: Any,
        like: fx.Node,
        before: fx.Node | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Insert a call before `like`, with its origin and a computed `meta["val"]`.

        Args:
            target: What to call.
            args: Its arguments.
            like: Node whose place and origin the new one takes.
            before: Another place.
            kwargs: Its keyword arguments.
        """
        with self.gm.graph.inserting_before(before or like):
            node = self.gm.graph.call_function(target, args, kwargs)
        self._inherit(node, like)
        values = fx.map_arg(args, lambda used: used.meta.get("val"))
        if self._fake_mode is not None:
            # kernels in C++ would fix an open size, in the program that the graph was copied from, too
            with self._fake_mode, open_size_kernels():
                node.meta["val"] = target(*values, **kwargs)
        self.changed = True
        return node

    def module(self, path: str, module: nn.Module) -> str:
        """Add a submodule under dotted `path`, made unique unless it is there already.

        Returns:
            The path that it got.
        """
        wanted, number = path, 0
        while (held := self._held(path)) is not module and held is not None:
            number += 1
            path = f"{wanted}_{number}"
        if held is None:
            holder, name = holder_of(self.gm, path, create=True)
            holder.add_module(name, module)
            self.changed = True
        return path

    def run_module(
        self,
        path: str,
        *args: Any,
        place: fx.Node,
        like: fx.Node,
        kwargs: Mapping[str, Any] | None = None,
    ) -> fx.Node:
        """Insert a call of a submodule before `place`; its value is described as that of `like`."""
        with self.gm.graph.inserting_before(place):
            node = self.gm.graph.call_module(path, args, dict(kwargs or {}))
        self._inherit(node, like)
        if "val" in like.meta:
            node.meta["val"] = like.meta["val"]
        self.changed = True
        return node

    def set_operand(self, node: fx.Node, position: int, value: fx.Node) -> None:
        """Let a node read another value at one place among its operands."""
        counter = iter(range(len(operands(node))))

        def swap(used: fx.Node) -> fx.Node:
            return value if next(counter) == position else used

        args, kwargs = fx.map_arg((node.args, node.kwargs), swap)
        node.args, node.kwargs = args, kwargs
        self.changed = True

    def substitute(self, reader: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let one node read `new` wherever it read `old`."""
        reader.replace_input_with(old, new)
        self.changed = True

    def redirect(self, old: fx.Node, new: fx.Node, keep: Callable[[fx.Node], bool]) -> None:
        """Let the users of `old`, but for those that `keep` names, use `new`."""
        old.replace_all_uses_with(
            new,
            delete_user_cb=lambda user: user is not new and not keep(user),
            propagate_meta=False,
        )
        self.changed = True

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of `old` use `new`, and drop `old`."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.gm.graph.erase_node(old)
        self.changed = True

    def relax_views(self) -> None:
        """Let views take operands in any order of memory, for graphs that are trained."""
        for node in self.gm.graph.nodes:
            relaxed = op_info.without_memory_order(node.target)
            self.changed |= relaxed is not node.target
            node.target = relaxed

    def delay_constants(self) -> None:
        """Move what is computed from stored tensors alone in front of its first reader.

        Whoever runs the graph then decodes one weight at a time; in front of everything else, all of
        them would be held until they are read. That alone is no change of the graph.
        """
        for node, reader in _first_readers(self.gm).items():
            if node.next is not reader:
                reader.prepend(node)

    def set_args(self, node: fx.Node, args: tuple[Any, ...]) -> None:
        """Give a call other positional arguments."""
        node.args = args
        self.changed = True

    def erase(self, node: fx.Node) -> None:
        """Drop a node without users."""
        self.gm.graph.erase_node(node)
        self.changed = True

    def drop(self, node: fx.Node) -> None:
        """Drop a constant's node if nothing reads it, and its tensor if no other node stands for it."""
        if node.users or node.op != "get_attr":
            return
        path = str(node.target)
        self.erase(node)
        if all(str(other.target) != path for other in self.constants()):
            self.delete_constant(path)

    def set_value(self, node: fx.Node, value: Tensor, *, tied: Sequence[fx.Node] = ()) -> None:
        """Replace the tensor behind a `get_attr` node, keeping its name and kind.

        Args:
            node: The constant.
            value: Its new value.
            tied: Other names of the same tensor, which stay tied to it.
        """
        shared: Tensor = value
        for constant in (node, *tied):
            holder, name = holder_of(self.gm, str(constant.target))
            old = getattr(holder, name)
            if isinstance(old, nn.Parameter):
                if not isinstance(shared, nn.Parameter):
                    shared = nn.Parameter(value, old.requires_grad)
                holder.register_parameter(name, shared)
            else:
                holder._buffers[name] = shared
        self.changed = True

    def adopt(self, other: fx.GraphModule) -> None:
        """Take over the graph, tensors and records of another module, which must not be used again."""
        for key in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.gm.__dict__[key] = other.__dict__[key]
        self.gm.graph = other.graph
        self.gm.meta.update(other.meta)
        self._fake_mode = _fake_mode_of(other.graph)
        self.changed = True

    def delete_constant(self, path: str) -> None:
        """Drop a tensor that no node refers to any more."""
        holder, name = holder_of(self.gm, path)
        delattr(holder, name)
        self.changed = True

    def record(
        self,
        rows: Sequence[TensorRecord] = (),
        *,
        remarks: Sequence[str] = (),
        activations: Sequence[ActivationRecord] = (),
    ) -> None:
        """Add to the record of what was done; that alone is no change of the graph.

        Args:
            rows: One per tensor; each replaces an earlier one of the same tensor.
            remarks: On the whole model.
            activations: One per scale of activations, and per op that stays in float.
        """
        record(self.gm, rows, remarks=remarks, activations=activations)

    def note(self, text: str) -> None:
        """Say something about the form of the graph's weights; that alone is no change."""
        note(self.gm, text)

    def _exists(self, path: str) -> bool:
        try:
            holder, name = holder_of(self.gm, path)
        except AttributeError:
            return False
        return hasattr(holder, name)

    def _held(self, path: str) -> nn.Module | None:
        try:
            return self.gm.get_submodule(path)
        except AttributeError:
            return None

    def _inherit(self, node: fx.Node, like: fx.Node) -> None:
        origin = like
        if "nn_module_stack" not in origin.meta:
            origin = next((user for user in like.users if "nn_module_stack" in user.meta), like)
        for key in ORIGIN:
            if key in origin.meta:
                node.meta[key] = origin.meta[key]

    def fake(self, value: Tensor) -> Any:
        """The value as `meta["val"]` holds it."""
        if self._fake_mode is None:
            return value.detach()
        return fake_of(value, self._fake_mode)


def _first_readers(gm: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """What is computed from stored tensors alone, in order → the first other node that needs it."""
    nodes = list(gm.graph.nodes)
    place = {node: number for number, node in enumerate(nodes)}
    written = state_nodes(gm)
    fixed = {node for node in nodes if node.op == "get_attr" and node not in written}
    moved: dict[fx.Node, int] = {}
    for node in nodes:
        used = node.all_input_nodes
        if used and node.users and fixed.issuperset(used) and _is_repeatable(node):
            fixed.add(node)
            moved[node] = 0
    for node in reversed(moved):
        moved[node] = min(moved.get(user, place[user]) for user in node.users)
    return {node: nodes[first] for node, first in moved.items()}


def _is_repeatable(node: fx.Node) -> bool:
    """Whether a node computes the same wherever it stands: it neither writes nor draws random numbers."""
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags


def _fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None
