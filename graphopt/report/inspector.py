"""ModelInspector: which names configs may use for a model, and what each of them selects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from graphopt.analysis.value_facts import data_values, entering_values, leaving_values
from graphopt.analysis.weights import state_operands
from graphopt.audited import Pattern, pattern
from graphopt.backends.lowering import as_program
from graphopt.errors import ConfigError, InputError
from graphopt.ir.editor import operands
from graphopt.ir.module_frames import module_frames
from graphopt.ir.op_info import info_of, op_names
from graphopt.ir.program import Program
from graphopt.report.model import (
    BoundaryEdge,
    InputEdge,
    ModelSummary,
    ModuleContext,
    ModuleInfo,
    OpInfo,
    SourceFrame,
)
from graphopt.report.text import summary_text

__all__ = ["ModelInspector", "op_names"]

_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n(?P<code>[^\n]*)'
)


class ModelInspector:
    r"""Modules, ops and states of a model under the names that configs use.

    >>> inspector = ModelInspector(model, example)
    >>> summary = inspector.format_summary()  # a text with modules, ops and states
    >>> len(inspector.get_matched_ops_for_op_type("linear"))
    2

    Args:
        model: A module, an `ExportedProgram`, a `Program` or a .pt2 file.
        example_inputs: Inputs of one call.
        execution_mode: Accepted for compatibility; models are always seen as graphs.
        compressor: `Quantizer`, `KMeansPalettizer` or `MagnitudePruner` (or a subclass): list only
            ops that it can compress; None lists all.
        dynamic_shapes: Accepted for compatibility; every dimension is open that the model leaves open.
        export_with_no_grad: Accepted for compatibility.
        example_kwargs: Keyword inputs of that call.

    Raises:
        CaptureError: The model cannot be exported.
        InputError: `compressor` is something else.
    """

    def __init__(
        self,
        model: nn.Module | ExportedProgram | Program | str | Path,
        example_inputs: tuple[Any, ...] | None = None,
        execution_mode: Any = None,
        compressor: type | None = None,
        dynamic_shapes: Any = None,
        export_with_no_grad: bool = True,
        *,
        example_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        del execution_mode, dynamic_shapes, export_with_no_grad
        self._shown = _filter_of(compressor)
        program = as_program(model, example_inputs, example_kwargs)
        self._gm = program.graph_module
        self._ops = _ops_of(self._gm)
        root = _tree(self._gm, self._ops, self._shown, program.provenance.source)
        self._summary = ModelSummary(root, state=program.state)

    @property
    def summary(self) -> ModelSummary:
        """The tree of modules, each with its ops."""
        return self._summary

    def format_summary(self, colorize: bool | None = None) -> str:
        """The tree as text, with what enters and leaves each module and op.

        Args:
            colorize: Add terminal colours; None does on a terminal.
        """
        return summary_text(self._summary, colorize)

    def get_matched_ops_for_op_type(self, op_type: str) -> tuple[OpInfo, ...]:
        """Ops that `op_type_config[op_type]` selects."""
        names = {node: op_names(node) for node in self._computing()}
        return self._found(lambda node: op_type in names[node])

    def get_matched_ops_for_op_name(self, pattern: str) -> tuple[OpInfo, ...]:
        """Ops whose whole name the regular expression matches.

        Raises:
            InputError: It is no regular expression.
        """
        matcher = _compiled(pattern)
        return self._found(lambda node: matcher.fullmatch(node.name))

    def get_matched_ops_for_module_name(self, pattern: str) -> tuple[OpInfo, ...]:
        """Ops inside modules whose whole name the regular expression matches.

        Raises:
            InputError: It is no regular expression.
        """
        matcher = _compiled(pattern)
        return self._found(
            lambda node: any(matcher.fullmatch(frame.name) for frame in module_frames(node))
        )

    def get_matched_ops_for_module_type(self, module_type: type | str) -> tuple[OpInfo, ...]:
        """Ops inside modules of a class, given itself or by its name with its module."""
        wanted = (
            module_type
            if isinstance(module_type, str)
            else f"{module_type.__module__}.{module_type.__qualname__}"
        )
        return self._found(lambda node: any(frame.type == wanted for frame in module_frames(node)))

    def _computing(self) -> Iterator[fx.Node]:
        return (node for node in self._ops if node.op == "call_function" and self._shown(node))

    def _found(self, chosen: Callable[[fx.Node], bool]) -> tuple[OpInfo, ...]:
        return tuple(self._ops[node] for node in self._computing() if chosen(node))


def _compiled(expression: str) -> Pattern:
    try:
        return pattern(expression)
    except ConfigError as error:
        raise InputError(str(error)) from None


def _filter_of(compressor: type | None) -> Callable[[fx.Node], bool]:
    if compressor is None:
        return lambda node: True
    compresses = getattr(compressor, "compresses", None) if isinstance(compressor, type) else None
    if compresses == "weights and activations":
        return lambda node: _has_scales(node) or _has_state(node)
    if compresses == "weights":
        return _has_state
    raise InputError(
        "compressor must be Quantizer, KMeansPalettizer or MagnitudePruner (the class), got"
        f" {compressor!r}"
    )


def _has_scales(node: fx.Node) -> bool:
    info = info_of(node)
    return info is not None and info.scales is not None


def _has_state(node: fx.Node) -> bool:
    return any(True for _ in state_operands(node))


def _ops_of(gm: fx.GraphModule) -> dict[fx.Node, OpInfo]:
    """One entry per node, with edges both ways; items of tuples are outputs of what gives these."""
    infos: dict[fx.Node, OpInfo] = {}
    items: dict[fx.Node, tuple[fx.Node, int]] = {}
    root = _root_type(gm)
    for node in gm.graph.nodes:
        if "getitem" in str(node.target) and isinstance(node.args[0], fx.Node):
            items[node] = (node.args[0], int(node.args[1]))
            continue
        state = node.op == "get_attr"
        name = str(node.target) if state or node.op == "placeholder" else node.name
        kind = op_names(node)[0] if node.op == "call_function" else None
        stack = (
            ModuleContext("", root),
            *(ModuleContext(frame.name, frame.type) for frame in module_frames(node) if frame.name),
        )
        infos[node] = OpInfo(name, kind, stack, _frames(node), is_state=state)
    for node, info in infos.items():
        edges = []
        for operand in operands(node):
            source, place = items.get(operand, (operand, 0))
            if source in infos:
                edges.append(InputEdge(infos[source], place))
                readers = infos[source].outputs.get(place, ())
                if info not in readers:
                    infos[source].outputs[place] = (*readers, info)
        info.inputs = tuple(edges)
    return infos


def _root_type(gm: fx.GraphModule) -> str:
    for node in gm.graph.nodes:
        for frame in module_frames(node):
            if not frame.name:
                return frame.type
    return ""


def _frames(node: fx.Node) -> tuple[SourceFrame, ...]:
    text = str(node.meta.get("stack_trace") or "")
    return tuple(
        SourceFrame(match["file"], int(match["line"]), match["function"], match["code"].strip())
        for match in _FRAME.finditer(text)
        if match["function"] == "forward"
    )


def _tree(
    gm: fx.GraphModule,
    ops: dict[fx.Node, OpInfo],
    shown: Callable[[fx.Node], bool],
    source: str,
) -> ModuleInfo:
    root = ModuleInfo("", _root_type(gm) or source)
    known = {"": root}
    inside: dict[str, list[fx.Node]] = {"": []}
    own: dict[str, list[OpInfo]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        owner = root
        inside[""].append(node)
        for frame in module_frames(node):
            if not frame.name:
                continue
            if frame.name not in known:
                known[frame.name] = ModuleInfo(frame.name, frame.type)
                owner.child_modules[frame.name] = known[frame.name]
            owner = known[frame.name]
            inside.setdefault(frame.name, []).append(node)
        if node in ops and shown(node):
            own.setdefault(owner.module_name, []).append(ops[node])
    data = data_values(gm)
    for name, module in known.items():
        module.ops = tuple(own.get(name, ()))
        entering = entering_values(inside[name], data)
        for index, places in enumerate(entering.values()):
            edges = [BoundaryEdge(ops[node], place) for node, place in places if node in ops]
            module.input_ops[index] = edges
        for index, node in enumerate(leaving_values(inside[name], data)):
            giver = node if node in ops else node.all_input_nodes[0]
            place = 0 if node in ops else int(str(node.args[1]))
            module.output_ops[index] = BoundaryEdge(ops[giver], place)
    return root
