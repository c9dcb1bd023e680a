"""What compression did to each layer: type, size, and error of weights and outputs."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.api import as_program
from graphopt.captured_module import CapturedModule, holder_of
from graphopt.editor import Editor, operands
from graphopt.errors import InputError
from graphopt.layerwise import Batch, as_batch, flat_inputs
from graphopt.lookups import find_lookups
from graphopt.pass_manager import run_passes
from graphopt.passes import FoldBatchNorm, RemoveUnused
from graphopt.passes.expand_tables import constant_value
from graphopt.program import Program
from graphopt.quantized import find_quantized_weights
from graphopt.table import finite_values
from graphopt.weights import module_frames, op_names, source_of, state_operands

__all__ = ["Difference", "LayerDifference", "diff"]

_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default
_SUFFIXES = ("_indices", "_lut", "_quantized", "_values", "_data")


@dataclass(frozen=True)
class LayerDifference:
    """One op with a weight.

    Attributes:
        name: Name of the weight.
        op: Node of the op.
        op_type: Its type.
        shape: Shape of the weight.
        dtype: How it was stored and is stored, as "float32 → 4-bit table".
        bits: Stored bits per element after, scales and tables included.
        tables: Number of tables, 0 without.
        bytes_before: Bytes of the weight before.
        bytes_after: Bytes that it takes after.
        weight_sqnr: 10·log10(Σw² / Σ(w − ŵ)²) in dB; inf where nothing changed.
        output_sqnr: The same of the op's outputs in the whole compressed program, errors of the
            layers before it included; None without data.
        own_sqnr: The same where the op reads the exact inputs, so that only its own weight counts;
            None without data.
    """

    name: str
    op: str
    op_type: str
    shape: tuple[int, ...]
    dtype: str
    bits: float
    tables: int
    bytes_before: int
    bytes_after: int
    weight_sqnr: float
    output_sqnr: float | None = None
    own_sqnr: float | None = None


@dataclass(frozen=True)
class Difference:
    """Layers in the order of the graph; prints as a table.

    Attributes:
        layers: One per op with a weight.
        output_sqnr: dB of each output of the whole model; () without data.
    """

    layers: tuple[LayerDifference, ...]
    output_sqnr: tuple[float, ...] = ()

    def __iter__(self) -> Iterator[LayerDifference]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def worst(self, count: int = 5) -> tuple[LayerDifference, ...]:
        """Layers whose own weights lose most, by outputs where these are known."""

        def loss(layer: LayerDifference) -> float:
            return layer.weight_sqnr if layer.own_sqnr is None else layer.own_sqnr

        return tuple(sorted(self.layers, key=loss)[:count])

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "output_sqnr": list(self.output_sqnr),
        }

    def to_json(self) -> str:
        """One JSON object; infinite figures are null."""
        return json.dumps(finite_values(self.to_dict()), indent=2)

    def __rich__(self) -> Table:
        before = sum(layer.bytes_before for layer in self.layers)
        after = sum(layer.bytes_after for layer in self.layers)
        title = f"{before / 1024:,.1f} → {after / 1024:,.1f} KiB"
        if self.output_sqnr:
            title += f", outputs {', '.join(_db(value) for value in self.output_sqnr)} dB"
        table = Table(title=title)
        for heading in (
            "weight",
            "op",
            "stored as",
            "bits",
            "KiB",
            "weight dB",
            "own dB",
            "output dB",
        ):
            right = heading in ("bits", "KiB", "weight dB", "own dB", "output dB")
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        for layer in self.layers:
            size = f"{layer.bytes_before / 1024:.1f} → {layer.bytes_after / 1024:.1f}"
            errors = [_db(each) for each in (layer.weight_sqnr, layer.own_sqnr, layer.output_sqnr)]
            table.add_row(
                layer.name, layer.op_type, layer.dtype, f"{layer.bits:.2f}", size, *errors
            )
        return table

    def __str__(self) -> str:
        stream = io.StringIO()
        Console(file=stream, width=140, no_color=True).print(self)
        return stream.getvalue()


def _db(value: float | None) -> str:
    return "" if value is None else "exact" if value == math.inf else f"{value:.1f}"


def diff(
    before: nn.Module | ExportedProgram | Program,
    after: nn.Module | ExportedProgram | Program,
    data: Iterable[Any] | None = None,
    *,
    example_inputs: Any = None,
) -> Difference:
    """Compare a model with what became of it, layer by layer.

    Args:
        before: The model, or a program of it.
        after: What a compressor made of it: a program, or a finalized module.
        data: Inputs of one call each, as for `as_batch`; with them outputs are compared, which shows
            where accuracy is lost.
        example_inputs: Inputs of one call, where a module has to be captured; the first of `data`, or
            those of the other program by default.

    Returns:
        One entry per op that has a weight in both. Batch norms that were folded into `after` are
        folded into `before` first.

    Raises:
        InputError: The two have no op in common, or data do not fit.
    """
    batches = [] if data is None else [as_batch(each) for each in data]
    given = example_inputs
    if given is None:
        known = [each for each in (before, after) if isinstance(each, Program)]
        given = known[0].example_args if known else batches[0][0] if batches else None
    first, second = _captured(before, given), _captured(after, given)
    exact, found = first.graph_module, second.graph_module
    if _norms(found) < _norms(exact):
        exact = first.copy().graph_module
        run_passes(exact, [FoldBatchNorm(), RemoveUnused()])
    pairs = _pairs(exact, found)
    if not pairs:
        raise InputError("the two programs have no op with a weight in common")
    measured = _Outputs(exact, found, pairs)
    for batch in batches:
        measured.add(batch)
    stored = _storage(found)
    layers = [
        _layer(exact, found, one, other, stored, measured if batches else None)
        for one, other in pairs
    ]
    return Difference(tuple(layers), measured.totals() if batches else ())


def _captured(model: Any, example: Any) -> Program:
    return as_program(model) if isinstance(model, Program) else as_program(model, example)


def _norms(gm: fx.GraphModule) -> int:
    return len(list(Editor(gm).calls(_NORM)))


def _pairs(first: fx.GraphModule, second: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Ops with weights that stand at the same place of both graphs: by module, type and order."""

    def keyed(gm: fx.GraphModule) -> dict[tuple[str, str, int], fx.Node]:
        seen: dict[tuple[str, str], int] = {}
        found = {}
        for node in gm.graph.nodes:
            if _weight_operand(node) is None:
                continue
            frames = module_frames(node)
            place = (frames[-1].name if frames else "", op_names(node)[0])
            seen[place] = seen.get(place, -1) + 1
            found[(*place, seen[place])] = node
        return found

    others = keyed(second)
    return [(node, others[key]) for key, node in keyed(first).items() if key in others]


def _weight_operand(node: fx.Node) -> fx.Node | None:
    for operand, position, role, axis in state_operands(node):
        if role == "weight" and position >= 0 and source_of(operand, axis) is not None:
            return operand
    return None


def _name(operand: fx.Node) -> str:
    source = source_of(operand, 0)
    name = str(source.node.target) if source is not None else operand.name
    for _ in range(2):
        for suffix in _SUFFIXES:
            name = name.removesuffix(suffix)
    return name


def _storage(gm: fx.GraphModule) -> dict[str, tuple[str, int]]:
    """Dense node → how it is stored and with how many tables."""
    found = {
        each.dense.name: (f"{each.n_bits}-bit table", math.prod(each.tables))
        for each in find_lookups(gm)
    }
    found |= {each.node.name: (each.storage, 0) for each in find_quantized_weights(gm)}
    return found


def _layer(
    exact: CapturedModule,
    found: CapturedModule,
    one: fx.Node,
    other: fx.Node,
    stored: dict[str, tuple[str, int]],
    measured: _Outputs | None,
) -> LayerDifference:
    first, second = _weight_operand(one), _weight_operand(other)
    assert first is not None
    assert second is not None
    edits = (Editor(exact), Editor(found))
    with torch.no_grad():
        values = [
            constant_value(edit, node) for edit, node in zip(edits, (first, second), strict=True)
        ]
    kinds, tables = [], 0
    sizes = [_bytes(exact, first), _bytes(found, second)]
    for node in _chain(second):
        if node.name in stored:
            kinds.append(stored[node.name][0])
            tables = max(tables, stored[node.name][1])
        elif "sparse_to_dense" in str(node.target):
            kinds.append("sparse")
    source = str(values[0].dtype).removeprefix("torch.")
    kind = source if not kinds else f"{source} → {' '.join(kinds)}"
    output = own = None
    if measured is not None:
        output, own = measured.of(one)
    return LayerDifference(
        name=_name(first), op=one.name, op_type=op_names(one)[0], shape=tuple(values[0].shape),
        dtype=kind, bits=8 * sizes[1] / max(values[0].numel(), 1), tables=tables,
        bytes_before=sizes[0], bytes_after=sizes[1],
        weight_sqnr=_sqnr(*_error(values[0], values[1])), output_sqnr=output, own_sqnr=own,
    )  # fmt: skip


def _chain(node: fx.Node) -> list[fx.Node]:
    if node.op == "get_attr":
        return [node]
    return [node, *(each for operand in operands(node) for each in _chain(operand))]


def _bytes(gm: fx.GraphModule, node: fx.Node) -> int:
    total = 0
    for path in {str(each.target) for each in _chain(node) if each.op == "get_attr"}:
        holder, name = holder_of(gm, path)
        tensor = getattr(holder, name)
        total += tensor.numel() * tensor.element_size()
    return total


def _error(want: Tensor, got: Tensor) -> tuple[float, float]:
    if want.shape != got.shape:
        return float(want.double().square().sum()), math.inf
    exact = want.detach().double()
    gap = exact - got.detach().double()
    return float(exact.square().sum()), float(gap.square().sum())


def _sqnr(energy: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(energy / noise) if energy > 0 and math.isfinite(noise) else -math.inf


class _Outputs:
    """Energies and errors of the outputs of paired ops, summed over batches."""

    def __init__(
        self, exact: CapturedModule, found: CapturedModule, pairs: Sequence[tuple[fx.Node, fx.Node]]
    ) -> None:
        self.exact, self.found, self.pairs = exact, found, pairs
        self.sums = {one: [0.0, 0.0, 0.0] for one, _ in pairs}
        self.whole: list[list[float]] = []

    def add(self, batch: Batch) -> None:
        twins = dict(self.pairs)
        first = _Recorder(self.exact, {one for one, _ in self.pairs}).run_on(batch)
        second = _Recorder(self.found, {other for _, other in self.pairs}).run_on(batch)
        edit = Editor(self.found)
        for one, other in self.pairs:
            want, got = first.values[one], second.values[other]
            energy, noise = _error(want, got)
            sums = self.sums[one]
            sums[0] += energy
            sums[1] += noise
            sums[2] += _error(want, self._alone(edit, one, twins[one], first))[1]
        for place, (want, got) in enumerate(zip(first.outputs, second.outputs, strict=True)):
            if place == len(self.whole):
                self.whole.append([0.0, 0.0])
            energy, noise = _error(want, got)
            self.whole[place][0] += energy
            self.whole[place][1] += noise

    def _alone(self, edit: Editor, one: fx.Node, other: fx.Node, exact: _Recorder) -> Tensor:
        """The compressed op on the exact inputs: constants of the one, data of the other."""
        own = {node: node for node in operands(other)}
        given: dict[fx.Node, Any] = {}
        for mine, theirs in zip(operands(other), operands(one), strict=False):
            if theirs in exact.inputs:
                given[mine] = exact.inputs[theirs]
            else:
                given[mine] = constant_value(edit, own[mine])
        args = fx.map_arg(other.args, given.__getitem__)
        kwargs = fx.map_arg(other.kwargs, given.__getitem__)
        found: Tensor = other.target(*args, **kwargs)  # type: ignore[operator]
        return found

    def of(self, one: fx.Node) -> tuple[float, float]:
        energy, noise, alone = self.sums[one]
        return _sqnr(energy, noise), _sqnr(energy, alone)

    def totals(self) -> tuple[float, ...]:
        return tuple(_sqnr(*sums) for sums in self.whole)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the outputs of some ops and the data that they read."""

    def __init__(self, gm: CapturedModule, kept: set[fx.Node]) -> None:
        super().__init__(gm)
        self.gm, self.kept = gm, kept
        constant: set[fx.Node] = set()
        for node in gm.graph.nodes:
            if node.op == "get_attr" or (
                node.op == "call_function" and node.all_input_nodes
                and all(each in constant for each in node.all_input_nodes)
            ):  # fmt: skip
                constant.add(node)
        self.read = {
            operand for node in kept for operand in operands(node) if operand not in constant
        }
        self.values: dict[fx.Node, Tensor] = {}
        self.inputs: dict[fx.Node, Any] = {}
        self.outputs: list[Tensor] = []

    def run_on(self, batch: Batch) -> _Recorder:
        with torch.no_grad():
            result = self.run(*flat_inputs(self.gm, batch), enable_io_processing=False)
        self.outputs = [each for each in pytree.tree_leaves(result) if isinstance(each, Tensor)]
        return self

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.kept:
            self.values[n] = value
        if n in self.read:
            self.inputs[n] = value
        return value
