"""A captured graph as a program of torch.export, built from the graph that is there.

Exporting again would trace, type and check what was traced, typed and checked when the graph was
captured. What cannot be built this way (control flow, sizes that depend on data, ops that write other
things than state) is left to `torch.export`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree
from typing_extensions import override

from graphopt.ir.captured_module import CapturedModule, holder_of
from graphopt.ir.decoded_tensor import fake_of
from graphopt.ir.editor import ORIGIN
from graphopt.ir.state import writes
from graphopt.ir.torch_private import FakeTensor, FakeTensorMode, OpOverload

__all__ = ["lifted"]

_PREFIXES = {InputKind.PARAMETER: "p_", InputKind.BUFFER: "b_", InputKind.CONSTANT_TENSOR: "c_"}
_COPY = "aten::copy_"


class _NotBuiltError(Exception):
    """The graph holds something that only a trace can turn into a program."""


def lifted(
    module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any], *, dynamic: bool = False
) -> ExportedProgram | None:
    """The graph as a program: for inputs of exactly these sizes, or for all that it was captured for.

    Args:
        module: It is not changed; the program shares its tensors.
        args: Example inputs.
        kwargs: Keyword inputs.
        dynamic: Keep the sizes that are open; else the example fixes every size, and those that the
            graph computes are constants.

    Returns:
        A functional program in the graph's own ops, state as mutated buffers and inputs; None where
        `torch.export` has to trace the module.
    """
    try:
        return (_OpenLift if dynamic else _Lift)(module, args, kwargs).program()
    except _NotBuiltError:
        return None


class _Lift:
    """One walk over a graph: values of fake tensors, and a node for each that is no constant."""

    def __init__(
        self, module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._module = module
        self._example = (tuple(args), dict(kwargs))
        self._graph = fx.Graph()
        self._mode = self._fake_mode()
        self._made: dict[fx.Node, Any] = {}  # node of the module → node of the program, or constant
        self._inputs: dict[InputKind, list[InputSpec]] = {kind: [] for kind in _PREFIXES}
        self._lifted: dict[str, fx.Node] = {}  # name of a tensor → what stands for it
        self._first_of: dict[int, fx.Node] = {}  # identity of a tensor → its first placeholder
        self._written: dict[fx.Node, fx.Node] = {}  # placeholder → what is written to it
        self._targets: dict[fx.Node, tuple[OutputKind, str]] = {}
        self._state: dict[str, Any] = {}
        self._constants: dict[str, Any] = {}

    def _fake_mode(self) -> FakeTensorMode:
        # sizes need sympy, which only this imports
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        return FakeTensorMode(shape_env=ShapeEnv(), export=True)

    def program(self) -> ExportedProgram:
        in_spec = pytree.tree_structure(self._example)
        info = getattr(self._module.graph._codegen, "pytree_info", None)
        if info is not None and info.in_spec != in_spec:
            raise _NotBuiltError
        user = self._user_inputs()
        self._first: fx.Node | None = next(iter(self._graph.nodes), None)
        with torch.no_grad():
            for path, _ in self._module.named_parameters(remove_duplicate=False):
                self._lift(path)
            for path, _ in self._module.named_buffers(remove_duplicate=False):
                self._lift(path)
            for node in self._module.graph.nodes:
                if node.op == "get_attr":
                    self._made[node] = self._lift(str(node.target))
                elif node.op == "call_function":
                    self._made[node] = self._call(node)
                elif node.op not in ("placeholder", "output"):
                    raise _NotBuiltError
        inputs = [*(spec for kind in _PREFIXES for spec in self._inputs[kind]), *user]
        names = [spec.arg.name for spec in inputs]
        outputs, out_spec = self._outputs(names)
        _order(self._graph, names)
        self._graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        arguments = None if info is None else list(info.orig_args)
        calls = ModuleCallSignature([], [], in_spec, out_spec, arguments)
        return ExportedProgram(
            root=nn.Module(),
            graph=self._graph,
            graph_signature=ExportGraphSignature(inputs, outputs),
            state_dict=self._state,
            range_constraints=self._ranges(),
            module_call_graph=[ModuleCallEntry("", calls)],
            example_inputs=self._example,
            constants=self._constants,
        )

    def _user_inputs(self) -> list[InputSpec]:
        leaves = pytree.tree_leaves(self._example)
        nodes = list(self._module.graph.find_nodes(op="placeholder"))
        if len(leaves) != len(nodes):
            raise _NotBuiltError
        specs = []
        for node, leaf in zip(nodes, leaves, strict=True):
            name = str(node.target)
            made = self._graph.create_node("placeholder", name, name=name)
            made.name = name
            if isinstance(leaf, Tensor):
                if type(leaf) is not Tensor and not isinstance(leaf, nn.Parameter):
                    raise _NotBuiltError
                made.meta["val"] = self._input_value(node, leaf)
                argument: Any = TensorArgument(name)
            else:
                made.meta["val"] = leaf
                argument = ConstantArgument(name, leaf)
            self._made[node] = made if isinstance(leaf, Tensor) else leaf
            self._targets[made] = (OutputKind.USER_INPUT_MUTATION, name)
            specs.append(InputSpec(InputKind.USER_INPUT, argument, None))
        return specs

    def _input_value(self, node: fx.Node, leaf: Tensor) -> Any:
        del node
        return self._mode.from_tensor(leaf.detach(), static_shapes=True)

    def _ranges(self) -> dict[Any, Any]:
        return {}

    def _lift(self, path: str) -> fx.Node:
        """The placeholder of a stored tensor; what reads one of several names reads the first's."""
        if path in self._lifted:
            return self._lifted[path]
        try:
            holder, attribute = holder_of(self._module, path)
        except AttributeError:
            raise _NotBuiltError from None
        value = getattr(holder, attribute)
        if not isinstance(value, Tensor):
            raise _NotBuiltError
        kind, persistent = InputKind.CONSTANT_TENSOR, None
        if isinstance(value, nn.Parameter):
            kind = InputKind.PARAMETER
        elif attribute in holder._buffers:
            kind = InputKind.BUFFER
            persistent = attribute not in holder._non_persistent_buffers_set
        kept = self._state if kind is InputKind.PARAMETER or persistent else self._constants
        kept[path] = value
        name = _PREFIXES[kind] + re.sub(r"[^a-z0-9]", "_", path.lower())
        with self._graph.inserting_before(self._first):
            made = self._graph.create_node("placeholder", name, name=name)
        made.target = made.name
        made.meta["val"] = fake_of(value, self._mode)
        self._inputs[kind].append(InputSpec(kind, TensorArgument(made.name), path, persistent))
        self._targets[made] = (OutputKind.BUFFER_MUTATION, path)
        self._lifted[path] = self._first_of.setdefault(id(value), made)
        return self._lifted[path]

    def _call(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._now)
        values, named = _values((args, kwargs))
        target: Any = node.target
        if _schema_name(target) == _COPY:
            return self._write(self._made[node.args[0]], args[1])  # type: ignore[index]
        foreign = not isinstance(target, OpOverload) and target is not operator.getitem
        if writes(node) or (foreign and _has_tensors((values, named))):
            raise _NotBuiltError
        value = self._value(node, values, named)
        if value is None:
            return None  # an assertion, which held
        if not _has_tensors(value) and not _is_open(value):
            return value
        made = self._graph.create_node("call_function", target, args, dict(kwargs), node.name)
        made.meta.update({key: node.meta[key] for key in ORIGIN if key in node.meta})
        made.meta["val"] = value
        return made

    def _value(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What a call gives, of fake tensors."""
        target: Any = node.target
        try:
            with self._mode:
                value = target(*args, **kwargs)
        except Exception as error:  # sizes that depend on data, and what fake tensors cannot do
            raise _NotBuiltError from error
        if _is_open(value):
            raise _NotBuiltError
        return value

    def _now(self, node: fx.Node) -> Any:
        """What stands for a node: behind a write to it, what was written."""
        made = self._made[node]
        return self._written.get(made, made) if isinstance(made, fx.Node) else made

    def _write(self, state: Any, value: Any) -> fx.Node:
        """Let a stored tensor or an input have another value from here on."""
        if state not in self._targets or not isinstance(value, fx.Node):
            raise _NotBuiltError
        held, given = state.meta["val"], value.meta["val"]
        if held.shape != given.shape or held.dtype != given.dtype:
            raise _NotBuiltError
        self._written[state] = value
        return value

    def _outputs(self, names: list[str]) -> tuple[list[OutputSpec], Any]:
        (output,) = self._module.graph.find_nodes(op="output")
        leaves = pytree.tree_leaves(output.args[0])
        given = [self._now(leaf) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        info = getattr(self._module.graph._codegen, "pytree_info", None)
        spec = pytree.tree_structure(tuple(given)) if info is None else info.out_spec
        if spec.num_leaves != len(given):
            raise _NotBuiltError
        kept = sorted(self._written.items(), key=lambda written: names.index(written[0].name))
        specs = [
            OutputSpec(self._targets[state][0], TensorArgument(value.name), self._targets[state][1])
            for state, value in kept
        ]
        for value in given:
            known = isinstance(value, fx.Node)
            if known and not isinstance(value.meta["val"], Tensor):
                raise _NotBuiltError
            if not known and not isinstance(value, int | float | bool | str | None):
                raise _NotBuiltError
            argument: Any = TensorArgument(value.name) if known else ConstantArgument("", value)
            specs.append(OutputSpec(OutputKind.USER_OUTPUT, argument, None))
        self._graph.output((*(value for _, value in kept), *given))
        return specs, spec


class _OpenLift(_Lift):
    """Values are those that the graph was captured with, and that passes have computed since."""

    @override
    def _fake_mode(self) -> FakeTensorMode:
        for node in self._module.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None:
                return value.fake_mode
        raise _NotBuiltError

    @override
    def _input_value(self, node: fx.Node, leaf: Tensor) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, FakeTensor) or value.dtype is not leaf.dtype:
            raise _NotBuiltError
        return value

    @override
    def _ranges(self) -> dict[Any, Any]:
        sizes: Any = self._mode.shape_env
        return {
            # a lower bound of 2 only says that the tracer has not specialised on 0 and 1
            size: type(known)(0, known.upper) if known.lower == 2 else known
            for size, known in sizes.var_to_range.items()
            if size not in sizes.replacements
        }

    @override
    def _value(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if not node.users:
            return None  # an assertion, or something that nothing reads
        if "val" not in node.meta:
            raise _NotBuiltError
        value = node.meta["val"]
        modes = {x.fake_mode for x in pytree.tree_leaves(value) if isinstance(x, FakeTensor)}
        if modes - {self._mode}:
            raise _NotBuiltError
        return value


def _values(arguments: Any) -> Any:
    return fx.map_arg(arguments, lambda node: node.meta["val"])


def _is_open(value: Any) -> bool:
    kinds = torch.SymInt | torch.SymFloat | torch.SymBool
    return any(isinstance(leaf, kinds) for leaf in pytree.tree_leaves(value))


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _schema_name(target: Any) -> str:
    return str(target._schema.name) if isinstance(target, OpOverload) else ""


def _order(graph: fx.Graph, names: Sequence[str]) -> None:
    """Put the placeholders in this order, before everything else."""
    by_name = {node.name: node for node in graph.find_nodes(op="placeholder")}
    first = next(iter(graph.nodes))
    for name in names:
        if by_name[name] is not first:
            first.prepend(by_name[name])
        else:
            first = first.next
