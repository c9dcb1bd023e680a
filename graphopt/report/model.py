"""What a model consists of, by the names that configs use: a tree of modules and a graph of ops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from graphopt.ir.state import StateTensor

__all__ = [
    "BoundaryEdge",
    "InputEdge",
    "ModelSummary",
    "ModuleContext",
    "ModuleInfo",
    "OpInfo",
    "SourceFrame",
]


@dataclass(frozen=True)
class ModuleContext:
    """One module around an op.

    Attributes:
        module_name: Dotted name, "" for the root.
        module_type: Class with its module.

    Examples:
        >>> from graphopt.inspection import ModelInspector
        >>> [op] = ModelInspector(model, example).summary.model.child_modules["0"].ops
        >>> isinstance(op.module_stack[-1], ModuleContext), op.module_stack[-1].module_name
        (True, '0')
    """

    module_name: str
    module_type: str


@dataclass(frozen=True)
class SourceFrame:
    """A line of a `forward` that led to an op.

    Attributes:
        filename: File.
        lineno: Line.
        function_name: Function.
        code_context: The line's text.

    Examples:
        >>> from graphopt.inspection import ModelInspector
        >>> [op] = ModelInspector(model, example).summary.model.child_modules["0"].ops
        >>> all(isinstance(frame, SourceFrame) for frame in op.source_frames)
        True
        >>> op.source_frames[-1].code_context
        'return F.linear(input, self.weight, self.bias)'
    """

    filename: str
    lineno: int
    function_name: str
    code_context: str


@dataclass(eq=False)
class OpInfo:
    """One op, input, state or output of a model; two are equal if their names are.

    Attributes:
        op_name: Name for `op_name_config`; of a state tensor its dotted name.
        op_type: Type for `op_type_config`; None for inputs, states and outputs.
        module_stack: Modules around it, outermost first.
        source_frames: Lines that led to it, innermost last.
        inputs: What it reads, in order.
        outputs: Output index → ops that read it.
        is_state: Whether it is a parameter or buffer.

    Examples:
        >>> from graphopt.inspection import ModelInspector
        >>> [op] = ModelInspector(model, example).summary.model.child_modules["0"].ops
        >>> isinstance(op, OpInfo), op.op_name, [edge.op.op_name for edge in op.inputs]
        (True, 'linear', ['input', '0.weight', '0.bias'])
    """

    op_name: str
    op_type: str | None
    module_stack: tuple[ModuleContext, ...] = ()
    source_frames: tuple[SourceFrame, ...] = ()
    inputs: tuple[InputEdge, ...] = ()
    outputs: dict[int, tuple[OpInfo, ...]] = field(default_factory=dict)
    is_state: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OpInfo) and other.op_name == self.op_name

    def __hash__(self) -> int:
        return hash(self.op_name)

    def __repr__(self) -> str:
        return f"OpInfo(op_name={self.op_name!r}, op_type={self.op_type!r})"


@dataclass(frozen=True)
class InputEdge:
    """One operand of an op.

    Attributes:
        op: What is read.
        output_idx: Which of its outputs.

    Examples:
        >>> from graphopt.inspection import ModelInspector
        >>> [op] = ModelInspector(model, example).summary.model.child_modules["0"].ops
        >>> isinstance(op.inputs[1], InputEdge), op.inputs[1].op.op_name, op.inputs[1].op.is_state
        (True, '0.weight', True)
    """

    op: OpInfo
    output_idx: int | None = 0

    def __getattr__(self, name: str) -> Any:
        if name in ("op_name", "op_type", "is_state", "module_stack", "inputs", "outputs"):
            return getattr(self.op, name)
        raise AttributeError(name)


@dataclass(frozen=True)
class BoundaryEdge:
    """Where a value enters or leaves a module.

    Attributes:
        op: The op inside that reads or gives it.
        index: Which of its operands or outputs.

    Examples:
        >>> from graphopt.inspection import ModelInspector
        >>> linear = ModelInspector(model, example).summary.model.child_modules["0"]
        >>> [edge] = linear.input_ops[0]
        >>> isinstance(edge, BoundaryEdge), edge.op.op_name, edge.index
        (True, 'linear', 0)
    """

    op: OpInfo
    index: int


@dataclass(eq=False)
class ModuleInfo:
    """One module.

    Attributes:
        module_name: Dotted name, "" for the root.
        module_type: Class with its module.
        child_modules: Dotted name → module, of its direct children.
        ops: Ops of its own, in order.
        input_ops: Index of an input, as `module_input_spec` counts, → where it is read.
        output_ops: Index of an output, as `module_output_spec` counts, → what gives it.

    Examples:
        >>> from graphopt.inspection import ModelInspector
        >>> linear = ModelInspector(model, example).summary.model.child_modules["0"]
        >>> isinstance(linear, ModuleInfo), linear.module_name, [op.op_type for op in linear.ops]
        (True, '0', ['linear'])
    """

    module_name: str
    module_type: str
    child_modules: dict[str, ModuleInfo] = field(default_factory=dict)
    ops: tuple[OpInfo, ...] = ()
    input_ops: dict[int, list[BoundaryEdge]] = field(default_factory=dict)
    output_ops: dict[int, BoundaryEdge] = field(default_factory=dict)

    def children(self) -> Iterator[ModuleInfo]:
        """Direct children."""
        yield from self.child_modules.values()

    def named_children(self) -> Iterator[tuple[str, ModuleInfo]]:
        """Dotted names and modules of the direct children."""
        yield from self.child_modules.items()

    def modules(self) -> Iterator[ModuleInfo]:
        """This module and all inside, outer ones first."""
        yield self
        for child in self.children():
            yield from child.modules()

    def named_modules(self) -> Iterator[tuple[str, ModuleInfo]]:
        """Dotted names with `modules`."""
        for module in self.modules():
            yield module.module_name, module

    def get_submodule(self, name: str) -> ModuleInfo:
        """The module of a dotted name.

        Raises:
            KeyError: There is none inside this one.
        """
        for known, module in self.named_modules():
            if known == name:
                return module
        raise KeyError(f"no module {name!r} inside {self.module_name or 'the model'!r}")

    def all_ops(self) -> Iterator[OpInfo]:
        """Ops of this module and of all inside."""
        for module in self.modules():
            yield from module.ops

    def __repr__(self) -> str:
        return f"ModuleInfo(module_name={self.module_name!r}, module_type={self.module_type!r})"


@dataclass(frozen=True)
class ModelSummary:
    """A model's tree.

    Attributes:
        model: The root module.
        mode: How it was seen, "graph".
        state: What the model changes from one call to the next.

    Examples:
        >>> from graphopt.inspection import ModelInspector
        >>> summary = ModelInspector(model, example).summary
        >>> isinstance(summary, ModelSummary), list(summary.model.child_modules)
        (True, ['0', '1', '2'])
    """

    model: ModuleInfo
    mode: str = "graph"
    state: tuple[StateTensor, ...] = ()
