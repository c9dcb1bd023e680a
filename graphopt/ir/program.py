"""Program: a captured graph with its state and where it came from."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.errors import InputError
from graphopt.exclusive import exclusively
from graphopt.ir.annotations import record_of
from graphopt.ir.captured_module import CapturedModule, InputGuards, KeptGraph
from graphopt.ir.decomposing import decomposed
from graphopt.ir.editor import Editor
from graphopt.ir.guards import by_signature, input_places
from graphopt.ir.lifting import lifted
from graphopt.ir.open_sizes import Limits, open_shapes, raised_ones
from graphopt.ir.quick_graphs import quick_graphs
from graphopt.ir.records import CompressionRecord
from graphopt.ir.state import StateTensor, state_tensors
from graphopt.ir.torch_private import symbolic_config
from graphopt.specs.artifact import ArtifactSpec

__all__ = ["Program", "Provenance", "export_graph", "share_graph"]


_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True)
class Provenance:
    """Where a program came from.

    Attributes:
        source: Class name of the model, or the path of the file.
        torch_version: Version that captured it.
        static_dims: Input dimensions that the graph fixes, as "x[1] = 3".
    """

    source: str
    torch_version: str = torch.__version__
    static_dims: tuple[str, ...] = ()


@exclusively
@quick_graphs()
def export_graph(
    module: CapturedModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic: bool = False,
    limits: Limits | None = None,
    decompositions: Mapping[Any, Any] | None = None,
) -> ExportedProgram:
    """Export a captured module again, with the shapes of `args` or with open ones.

    Args:
        module: What to export; it is not changed.
        args: Example inputs.
        kwargs: Example keyword inputs.
        dynamic: Leave every dimension open that the graph leaves open.
        limits: Leave these open instead, see `open_shapes`; None or {} for what `dynamic` says.
        decompositions: Op → what replaces it; where None, `aten.linear` and the like stay whole.

    Returns:
        An inference program.
    """
    kwargs = dict(kwargs or {})
    table = dict(decompositions or {})
    if not dynamic and not limits:
        built = lifted(module, args, kwargs)
        whole = (
            _exported(module, args, kwargs, table) if built is None else decomposed(built, table)
        )
        return _with_plain_results(whole)
    exported = None if limits else lifted(module, args, kwargs, dynamic=True)
    exported = (
        _opened(module, args, kwargs, table, limits)
        if exported is None
        else decomposed(exported, table)
    )
    _pass_guards_on(module, exported, args, kwargs)
    exported.example_inputs = (args, kwargs)
    return _with_plain_results(exported)


def _with_plain_results(exported: ExportedProgram) -> ExportedProgram:
    """Tuples for torch's own results (`torch.return_types.topk`), which no file can name."""

    def is_named(part: Any) -> bool:
        return type(part).__module__ == "torch.return_types"

    def plain(whole: Any) -> Any:
        return pytree.tree_map(
            lambda part: tuple(map(plain, part)) if is_named(part) else part,
            whole,
            is_leaf=is_named,
        )

    signature = exported.module_call_graph[0].signature
    assert signature is not None
    spec = signature.out_spec
    signature.out_spec = pytree.tree_structure(plain(spec.unflatten(range(spec.num_leaves))))
    return exported


def _opened(
    module: CapturedModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    table: dict[Any, Any],
    limits: Limits | None,
) -> ExportedProgram:
    """Traced by torch, with sizes of 1 doubled where they are open."""
    examples = [(args, kwargs)]
    raised = raised_ones(module, args, kwargs, limits or None)
    if raised is not None:
        # torch.export specialises on sizes of 1
        examples.insert(0, raised)
    *narrower, last = examples
    for example in narrower:
        with contextlib.suppress(Exception):
            return _exported(module, *example, table, dynamic=True, limits=limits or None)
    return _exported(module, *last, table, dynamic=True, limits=limits or None)


def _exported(
    module: CapturedModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    table: dict[Any, Any],
    *,
    dynamic: bool = False,
    limits: Limits | None = None,
) -> ExportedProgram:
    with (
        symbolic_config.patch(  # type: ignore[attr-defined]
            backed_size_oblivious=dynamic
        ),
        torch.no_grad(),
    ):
        shapes: Any = open_shapes(module, args, kwargs, limits) if dynamic else None
        exported = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
        return exported.run_decompositions(table)


def _pass_guards_on(
    module: CapturedModule, exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Keep the conditions under which the graph was captured; torch.export skips module hooks."""
    known = getattr(exported, "_guards_code", None)
    if not isinstance(known, list):
        return
    hooks = module._forward_pre_hooks.values()
    captured = [code for hook in hooks if isinstance(hook, InputGuards) for code in hook.conditions]
    places = input_places(module, args, kwargs)
    guards = InputGuards(
        tuple(inspect.signature(module.forward).parameters),
        by_signature([*known, *captured], places),
    )
    known[:] = guards.without(guards.violated(args, kwargs)).conditions


@dataclass(frozen=True)
class Program:
    """A captured graph: what passes, searches and backends work on.

    Attributes:
        graph_module: The graph with its weights; passes change it in place, so work on `copy()`.
        example_args: Inputs that it was captured with.
        example_kwargs: Keyword inputs that it was captured with.
        provenance: Where it came from.
        artifact: The file that it is for; None for any.

    Examples:
        >>> program = graphopt.capture(model, example)
        >>> bool(torch.equal(program.module()(*example), model(*example)))
        True
    """

    graph_module: CapturedModule
    example_args: tuple[Any, ...]
    example_kwargs: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))
    artifact: ArtifactSpec | None = None

    def __post_init__(self) -> None:
        for name in ("example_args", "example_kwargs"):
            # a slice of a dataset would be saved with all of the dataset
            object.__setattr__(self, name, pytree.tree_map(_without_rest, getattr(self, name)))

    def __repr__(self) -> str:
        nodes = self.graph_module.graph.nodes
        ops = sum(node.op.startswith("call") for node in nodes)
        inputs = [str(node.target) for node in nodes if node.op == "placeholder"]
        size = sum(tensor.nbytes for tensor in self.graph_module.parameters())
        size += sum(tensor.nbytes for tensor in self.graph_module.buffers())
        about = f"{ops} ops, inputs {', '.join(inputs) or 'none'}, {size:,} bytes of tensors"
        return f"{type(self).__name__}({self.provenance.source}: {about})"

    def module(self) -> CapturedModule:
        """A callable copy, independent of the program; with gradients, too, under which other kernels run."""
        copied = copy.deepcopy(self.graph_module)
        Editor(copied).relax_views()
        copied.recompile()
        return copied

    def copy(self) -> Program:
        """A program whose graph can be changed freely; tensors are shared until replaced."""
        return replace(self, graph_module=share_graph(self.graph_module))

    @property
    def exported_program(self) -> ExportedProgram:
        """The program as `torch.export` sees it, with open dimensions where the graph allows."""
        return self.export(dynamic=True)

    def export(self, *, dynamic: bool = False) -> ExportedProgram:
        """Export with the example's shapes, or with open dimensions.

        Raises:
            InputError: The program has no example inputs.
        """
        if not self.example_args and not self.example_kwargs:
            raise InputError("the program has no example inputs; give `example_inputs`")
        return export_graph(
            self.graph_module, self.example_args, self.example_kwargs, dynamic=dynamic
        )

    def with_example(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Program:
        """The same graph with other example inputs."""
        return replace(self, example_args=tuple(args), example_kwargs=dict(kwargs or {}))

    def fingerprint(self) -> str:
        """Hash of the graph's ops, targets and shapes; equal graphs have equal fingerprints."""
        digest = hashlib.sha256()
        for node in self.graph_module.graph.nodes:
            value = node.meta.get("val")
            shape = tuple(map(str, value.shape)) if isinstance(value, Tensor) else ()
            digest.update(f"{node.op}|{node.target}|{node.args}|{shape}\n".encode())
        return digest.hexdigest()

    @property
    def state(self) -> tuple[StateTensor, ...]:
        """What the graph changes from one call to the next; empty for most programs."""
        return state_tensors(self.graph_module)

    @property
    def table(self) -> CompressionRecord:
        """What was done to each tensor; empty before any compression."""
        return record_of(self.graph_module)


def _without_rest(value: Any) -> Any:
    """A tensor without what else its storage holds."""
    if type(value) is not Tensor or value.layout != torch.strided:
        return value
    whole = value.untyped_storage().nbytes()
    return value.clone() if whole > value.numel() * value.element_size() else value


def share_graph(module: _Module) -> _Module:
    """Copy a module's graph and tree while its tensors stay shared."""
    tensors = [*module.parameters(), *module.buffers()]
    kept = [x for x in getattr(module, "meta", {}).values() if isinstance(x, KeptGraph)]
    memo: dict[int, Any] = {id(shared): shared for shared in (*tensors, *kept)}
    return copy.deepcopy(module, memo)
