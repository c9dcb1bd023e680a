"""A program's graph as viewers show it: modules that fold, weights inside the ops that read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.open_dims import open_dims
from graphopt.analysis.stored_values import stored_values
from graphopt.ir.annotations import describe_annotations
from graphopt.ir.editor import operands
from graphopt.ir.graph_text import op_name
from graphopt.ir.module_frames import module_frames
from graphopt.ir.program import Program
from graphopt.report.bits import stored_tensors
from graphopt.report.names import weight_name
from graphopt.run.interpreter import Interpreter

__all__ = ["GraphView", "ViewNode", "ViewWeight", "view_of"]


@dataclass(frozen=True)
class ViewWeight:
    """A constant of an op.

    Attributes:
        name: Its dotted name.
        shape: Its shape, as "64×3×7×7".
        stored: How it is stored, such as "4-bit table" or "float32".
        bits: Stored bits per element, tables and scales included.
        elements: Number of elements.
        snr_db: 10·log10(Σw² / Σ(w − ŵ)²); None where it is left alone.
    """

    name: str
    shape: str
    stored: str
    bits: float
    elements: int
    snr_db: float | None


@dataclass(frozen=True)
class ViewNode:
    """A box: an op, an input, a state or the output.

    Attributes:
        id: Name of the node.
        label: Its op, or its name.
        kind: "op", "rounding" or "data".
        group: Place of its module in `GraphView.groups`.
        shape: Types and sizes of what it gives, in numbers, open dimensions by name.
        weights: Its constants.
        facts: Further lines.
    """

    id: str
    label: str
    kind: str
    group: int
    shape: str
    weights: tuple[ViewWeight, ...] = ()
    facts: tuple[str, ...] = ()


@dataclass(frozen=True)
class GraphView:
    """What a viewer is given.

    Attributes:
        title: The model's name.
        nodes: Boxes in the order of the graph.
        edges: (place of the giver, place of the reader) in `nodes`.
        groups: (name, type, place of the group around it or -1) of each module; the first is the root.
        dims: Names of open dimensions, as "N = x[0], 1 in the example".
    """

    title: str
    nodes: tuple[ViewNode, ...]
    edges: tuple[tuple[int, int], ...]
    groups: tuple[tuple[str, str, int], ...]
    dims: tuple[str, ...] = field(default=())


def view_of(program: Program) -> GraphView:
    """The graph of a program with the figures of its record, where it has one."""
    sizes = Sizes(program)
    runner = Interpreter(program.graph_module)
    weights = _Weights(program)
    items = {node for node in runner.nodes if "getitem" in str(node.target)}
    groups = _Groups(program.provenance.source)
    places: dict[fx.Node, int] = {}
    nodes: list[ViewNode] = []
    edges: dict[tuple[int, int], None] = {}
    for node in runner.nodes:
        used = operands(node)
        if node in runner.constant and not any(user.op == "output" for user in node.users):
            continue
        if isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool):
            continue  # sizes that are computed are told by the shapes
        if node in items and used[0] in places:
            places[node] = places[used[0]]
            continue
        places[node] = len(nodes)
        constants = [operand for operand in used if operand in runner.constant]
        nodes.append(
            ViewNode(
                node.name,
                str(node.target) if node.op in ("placeholder", "get_attr") else _label(node),
                _kind(node),
                groups.around(node),
                sizes.text(node.meta.get("val")),
                tuple(weights.of(operand) for operand in dict.fromkeys(constants)),
                tuple(
                    filter(None, (sizes.formulas(node.meta.get("val")), describe_annotations(node)))
                ),
            )
        )
        for operand in used:
            if operand in places and places[operand] != places[node]:
                edges[places[operand], places[node]] = None
    return GraphView(
        program.provenance.source, tuple(nodes), tuple(edges), tuple(groups.known), sizes.names()
    )


def _label(node: fx.Node) -> str:
    """An op's name without its package and overload."""
    parts = op_name(node.target).split(".")
    return parts[1] if len(parts) == 3 else parts[-1]


def _kind(node: fx.Node) -> str:
    if node.op in ("placeholder", "output", "get_attr"):
        return "data"
    rounds = str(node.target).startswith(("quantized_decomposed", "graphopt.round"))
    return "rounding" if rounds else "op"


class _Groups:
    """Modules by the way that leads to them."""

    def __init__(self, source: str) -> None:
        self.known: list[tuple[str, str, int]] = [("", source, -1)]
        self._places: dict[tuple[str, ...], int] = {(): 0}

    def around(self, node: fx.Node) -> int:
        way: tuple[str, ...] = ()
        for frame in module_frames(node):
            if not frame.name:
                continue
            parent, way = self._places[way], (*way, frame.name)
            if way not in self._places:
                self._places[way] = len(self.known)
                self.known.append((frame.name, frame.type.rpartition(".")[2], parent))
        return self._places[way]


class _Weights:
    """What is known of constants: the record's figures, or else what is stored."""

    def __init__(self, program: Program) -> None:
        self._held = stored_tensors(program.graph_module)
        self._labels = {each.dense: each.label for each in stored_values(program.graph_module)}
        self._rows = {name: row for row in program.table for name in (row.name, *row.aliases)}

    def of(self, operand: fx.Node) -> ViewWeight:
        chain = list(dict.fromkeys(_chain(operand)))
        paths = [str(node.target) for node in chain if node.op == "get_attr"]
        name = weight_name(paths[0]) if paths else operand.name
        value = operand.meta.get("val")
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        held = [self._held[path] for path in paths if path in self._held]
        dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""
        stored = " ".join(self._labels[node] for node in chain if node in self._labels) or dtype
        row = self._rows.get(name)
        text = "×".join(map(str, shape))
        if row is not None:
            about = (row.bits_per_weight, row.numel, row.snr_db)
        else:
            elements = sum(each.elements for each in held)
            about = (sum(each.bits for each in held) / max(elements, 1), elements, None)
        return ViewWeight(name, text, stored, *about)


def _chain(node: fx.Node) -> Iterable[fx.Node]:
    yield node
    for operand in operands(node):
        yield from _chain(operand)


class Sizes:
    """Sizes in numbers: those of the example, with the names of dimensions that are open."""

    def __init__(self, program: Program) -> None:
        self._dims = {dim.symbol: dim for dim in reversed(open_dims(program)) if dim.is_free}
        letters: dict[str, str] = {}
        for dim in reversed(self._dims.values()):
            letter = {0: "N", 1: "L", 2: "H", 3: "W"}.get(dim.axis, "D")
            taken = letters.values()
            names = [letter, *(f"{letter}{number}" for number in range(2, len(self._dims) + 2))]
            letters[dim.symbol] = next(name for name in names if name not in taken)
        self._letters = letters
        self._printed: dict[Any, str] = {}

    def names(self) -> tuple[str, ...]:
        """What the names stand for."""
        return tuple(
            f"{letter} = {self._dims[symbol].place}, {self._dims[symbol].example} in the example"
            for symbol, letter in self._letters.items()
        )

    def text(self, value: Any) -> str:
        """Such as "N×64×112×112"; sizes that follow from open ones are those of the example."""
        if isinstance(value, Tensor):
            return "×".join(self._size(size) for size in value.shape) or "scalar"
        if isinstance(value, list | tuple):
            return ", ".join(self.text(item) for item in value)
        return ""

    def formulas(self, value: Any) -> str:
        """Type, and sizes that follow from open ones."""
        if not isinstance(value, Tensor):
            return ""
        dtype = str(value.dtype).removeprefix("torch.")
        following = [
            f"{self._size(size)} = {self._named(size)}"
            for size in value.shape
            if isinstance(size, torch.SymInt) and self._text(size.node.expr) not in self._letters
        ]
        return ", ".join([dtype, *dict.fromkeys(following)])

    def _size(self, size: Any) -> str:
        if not isinstance(size, torch.SymInt):
            return str(size)
        expression: Any = size.node.expr
        if self._text(expression) in self._letters:
            return self._letters[self._text(expression)]
        known = {
            symbol: self._dims[str(symbol)].example
            for symbol in expression.free_symbols
            if str(symbol) in self._dims
        }
        found = expression.subs(known)
        return str(int(found)) if found.is_number else "?"

    def _text(self, expression: Any) -> str:
        # expressions take long to print, and most sizes occur often
        if expression not in self._printed:
            self._printed[expression] = str(expression)
        return self._printed[expression]

    def _named(self, size: Any) -> str:
        expression: Any = size.node.expr
        own: Mapping[Any, str] = {
            symbol: self._letters.get(str(symbol), str(symbol))
            for symbol in expression.free_symbols
        }
        text = self._text(expression)
        for symbol in sorted(own, key=lambda each: -len(str(each))):
            text = text.replace(str(symbol), own[symbol])
        return text
