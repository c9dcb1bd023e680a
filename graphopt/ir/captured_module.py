"""CapturedModule: an exported graph as a callable module that copies, saves and moves like any other."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn

from graphopt.errors import InputError
from graphopt.exclusive import exclusive
from graphopt.ir.conditions import condition_code, holds, is_shape_condition
from graphopt.ir.quick_graphs import compile_now, compile_when_called
from graphopt.ir.torch_private import HigherOrderOperator, OpOverload

__all__ = [
    "CapturedModule",
    "InputGuards",
    "KeptGraph",
    "callable_graph",
    "holder_of",
    "set_tensor",
]

_NO_CALL = (
    "the graph is no module that can be called: it takes its weights as inputs, as the graph_module of"
    " an ExportedProgram and the graphs in ExecuTorch's transform_passes do, or was not made by"
    " torch.export; run the passes on `exported_program.module()`, or give the program itself to"
    " graphopt.compress or Pipeline.run"
)


class InputGuards:
    """A forward pre-hook that refuses inputs whose sizes the captured graph cannot serve."""

    def __init__(self, names: Sequence[str], conditions: Sequence[str]) -> None:
        self.names = tuple(names)
        self.conditions = tuple(code for code in conditions if is_shape_condition(code))

    def violated(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
        """Conditions that these inputs do not meet."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        failed = []
        for code in self.conditions:
            try:
                met = holds(condition_code(code), given)
            except (KeyError, IndexError, AttributeError, TypeError, ArithmeticError):
                continue
            if not met:
                failed.append(code)
        return failed

    def without(self, conditions: Sequence[str]) -> InputGuards:
        """The same guards less some conditions."""
        return InputGuards(self.names, [c for c in self.conditions if c not in conditions])

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the inputs of a call; under torch.export the conditions become the program's own.

        Traces of torch.jit have sizes that are tensors.
        """
        if torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return
        failed = self.violated(args, kwargs)
        if failed:
            given = {**dict(zip(self.names, args, strict=False)), **kwargs}
            shapes = {
                name: tuple(value.shape)
                for name, value in given.items()
                if isinstance(value, Tensor)
            }
            raise InputError(
                f"inputs {shapes} do not fit the captured graph, which needs {failed[0]}; capture"
                " with an example of these sizes, or give `dynamic_shapes`"
            )


class CapturedModule(fx.GraphModule):
    """A graph with its weights under the model's own names.

    It has the signature of the captured model. Copies share nothing; `torch.save` keeps node
    metadata (module stack, source line, annotations), which a plain GraphModule loses. Its graph becomes
    code when it is first called or its code read, not whenever a pass has changed it.

    Examples:
        >>> module = graphopt.capture(model, example).module()
        >>> isinstance(module, CapturedModule), [name for name, _ in module.named_parameters()]
        (True, ['0.weight', '0.bias', '2.weight', '2.bias'])
    """

    def recompile(self) -> None:  # type: ignore[override]
        """Let the graph become code at the next use."""
        compile_when_called(self)

    def compiled(self) -> Self:
        """The module, its graph as code."""
        compile_now(self)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        tree = nn.Module()
        tree.__dict__.update({key: self.__dict__[key] for key in _TREE})
        meta = {key: value for key, value in self.meta.items() if key.startswith("graphopt.")}
        nodes = [_pack_node(node) for node in self.graph.nodes]
        return _restore, (tree, nodes, self.graph._codegen, meta)

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        tree = nn.Module()
        memo[id(self)] = tree
        with exclusive(), warnings.catch_warnings():
            # torch's own tree specs warn about themselves when they are copied
            warnings.simplefilter("ignore", FutureWarning)
            tree.__dict__.update({key: _copied(key, self.__dict__[key], memo) for key in _TREE})
            graph = copy.deepcopy(self.graph, memo)
        copied = CapturedModule(tree, graph)
        copied.__dict__.update({key: tree.__dict__[key] for key in _TREE})
        copied.meta = {
            key: copy.deepcopy(value, memo) if isinstance(value, KeptGraph) else value
            for key, value in self.meta.items()
        }
        memo[id(self)] = copied
        return copied


def _copied(name: str, value: Any, memo: dict[int, Any]) -> Any:
    """What `copy.deepcopy` makes of an attribute of a module, without its cost for holders of tensors."""
    if isinstance(value, dict | set) and not value:
        return type(value)()
    if name == "_modules":
        return {child: _copied_holder(module, memo) for child, module in value.items()}
    if name in ("_parameters", "_buffers"):
        return {path: copy.deepcopy(tensor, memo) for path, tensor in value.items()}
    return copy.deepcopy(value, memo)


def _copied_holder(module: nn.Module | None, memo: dict[int, Any]) -> Any:
    """A copy of a module; one of another class than torch's plain one copies itself."""
    if type(module) is not nn.Module or id(module) in memo:
        return copy.deepcopy(module, memo)
    copied = memo[id(module)] = nn.Module.__new__(nn.Module)
    for name, value in module.__dict__.items():
        copied.__dict__[name] = _copied(name, value, memo)
    return copied


@dataclass(frozen=True)
class KeptGraph:
    """A graph in a module's `meta` that is copied with the module, sharing the tensors of both.

    Attributes:
        graph: The graph; it is never changed.
        digest: What the module was like when the graph stood for it (`ir.neutral_form`).
    """

    graph: CapturedModule
    digest: str


_TREE = (
    *("training", "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)
_PORTABLE_META = ("nn_module_stack", "stack_trace", "torch_fn", "graphopt")


@dataclass(frozen=True)
class _NodeRef:
    name: str


@dataclass(frozen=True)
class _TorchRef:
    """An op or constant of torch by its dotted name, for those that cannot be pickled."""

    name: str

    def resolve(self) -> Any:
        value: Any = torch
        for part in self.name.split("."):
            value = getattr(value, part)
        return value


def _packed(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return _NodeRef(value.name)
    if isinstance(value, torch.memory_format | torch.layout):
        return _TorchRef(str(value).removeprefix("torch."))
    if isinstance(value, tuple):
        return tuple(_packed(item) for item in value)
    if isinstance(value, list):
        return [_packed(item) for item in value]
    if isinstance(value, dict):
        return {key: _packed(item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(_packed(value.start), _packed(value.stop), _packed(value.step))
    return value


def _pack_node(node: fx.Node) -> tuple[Any, ...]:
    target: Any = node.target
    if isinstance(target, OpOverload):
        target = _TorchRef(f"ops.{target}")
    elif isinstance(target, HigherOrderOperator):
        target = _TorchRef(f"ops.higher_order.{target.name()}")
    args, kwargs = _packed(node.args), _packed(node.kwargs)
    meta = {key: node.meta[key] for key in _PORTABLE_META if key in node.meta}
    return node.op, node.name, target, args, kwargs, meta


def _restore(
    tree: nn.Module,
    nodes: list[tuple[Any, ...]],
    codegen: Any,
    meta: dict[str, Any],
) -> CapturedModule:
    graph = fx.Graph()
    graph.set_codegen(codegen)
    made: dict[str, fx.Node] = {}

    def linked(value: Any) -> Any:
        if isinstance(value, _NodeRef):
            return made[value.name]
        if isinstance(value, _TorchRef):
            return value.resolve()
        if isinstance(value, tuple | list):
            return type(value)(linked(item) for item in value)
        if isinstance(value, dict):
            return {key: linked(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(linked(value.start), linked(value.stop), linked(value.step))
        return value

    for op, name, target, args, kwargs, node_meta in nodes:
        resolved = target.resolve() if isinstance(target, _TorchRef) else target
        node = graph.create_node(op, resolved, linked(tuple(args)), linked(dict(kwargs)), name)
        node.meta.update(node_meta)
        made[name] = node
    module = CapturedModule(tree, graph)
    module.__dict__.update({key: tree.__dict__[key] for key in _TREE})
    module.meta.update(meta)
    return module


def callable_graph(gm: fx.GraphModule) -> CapturedModule:
    """The graph, of which calls can be made: a captured one, or what `ExportedProgram.module()` gives.

    Raises:
        InputError: It has not the signature of a call.
    """
    if hasattr(gm.graph._codegen, "pytree_info"):
        return cast("CapturedModule", gm)
    raise InputError(_NO_CALL)


def holder_of(module: nn.Module, path: str, *, create: bool = False) -> tuple[nn.Module, str]:
    """The submodule that holds attribute `path`, and the attribute's own name.

    Args:
        module: Root.
        path: Dotted path of a tensor.
        create: Make missing submodules on the way.

    Raises:
        AttributeError: A submodule is missing and `create` is False.
    """
    *parents, name = path.split(".")
    for part in parents:
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            if not create:
                raise AttributeError(f"no submodule {part!r} on the way to {path!r}")
            child = nn.Module()
            module.add_module(part, child)
        module = child
    return module, name


def set_tensor(holder: nn.Module, name: str, value: Tensor) -> None:
    """Replace an attribute by another tensor, as the parameter or buffer that it was."""
    old = getattr(holder, name)
    if isinstance(old, nn.Parameter):
        holder.register_parameter(name, nn.Parameter(value, old.requires_grad))
    else:
        holder._buffers[name] = value
