"""What compression did to each layer: type, size, and error of weights and outputs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from rich.table import Table
from torch import fx, nn
from torch.export import ExportedProgram

from graphopt.analysis.stored_values import stored_values
from graphopt.analysis.weights import source_of, state_operands
from graphopt.backends.lowering import as_program
from graphopt.errors import InputError
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.correspondence import Correspondence
from graphopt.ir.editor import Editor, operands
from graphopt.ir.module_frames import module_frames
from graphopt.ir.op_info import BATCH_NORM, op_names
from graphopt.ir.program import Program
from graphopt.ir.records import finite_values
from graphopt.passes import FoldBatchNorm, RemoveUnused
from graphopt.passes.pass_manager import run_passes
from graphopt.report.bits import StoredTensor, stored_tensors
from graphopt.report.names import weight_of
from graphopt.report.notebook import ShownAsTable
from graphopt.report.output_errors import OutputErrors, error_of, sqnr
from graphopt.run.batches import Batch, as_batch
from graphopt.run.interpreter import constant_value

__all__ = ["Difference", "LayerDifference", "decibels", "diff"]


@dataclass(frozen=True)
class LayerDifference:
    """One weight of an op; those of a recurrent layer share the figures of its outputs.

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

    Examples:
        >>> layer = graphopt.inspection.diff(program, compressed).layers[0]
        >>> isinstance(layer, LayerDifference), layer.name, layer.dtype, layer.weight_sqnr > 10
        (True, '0.weight', 'float32 → 4-bit table', True)
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
class Difference(ShownAsTable):
    """Layers in the order of the graph; prints as a table.

    Attributes:
        layers: One per op with a weight.
        output_sqnr: dB of each output of the whole model; () without data.

    Examples:
        >>> difference = graphopt.inspection.diff(program, compressed, batches)
        >>> isinstance(difference, Difference), [layer.name for layer in difference.layers]
        (True, ['0.weight', '2.weight'])
    """

    layers: tuple[LayerDifference, ...]
    output_sqnr: tuple[float, ...] = ()
    _width: ClassVar[int] = 140

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
            title += f", outputs {', '.join(decibels(value) for value in self.output_sqnr)} dB"
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
            errors = [
                decibels(each) for each in (layer.weight_sqnr, layer.own_sqnr, layer.output_sqnr)
            ]
            table.add_row(
                layer.name, layer.op_type, layer.dtype, f"{layer.bits:.2f}", size, *errors
            )
        return table


def decibels(value: float | None) -> str:
    """A figure for people: "exact" where nothing differs, nothing where nothing is known."""
    return "" if value is None else "exact" if value == math.inf else f"{value:.1f}"


def diff(
    before: nn.Module | ExportedProgram | Program,
    after: nn.Module | ExportedProgram | Program,
    data: Iterable[Any] | None = None,
    *,
    example_inputs: Any = None,
) -> Difference:
    """Compare a model with what became of it, layer by layer.

    Weights that `MigrateScales` has moved ranges into are other weights, although the graph computes the
    same: their own columns count the move, outputs do not.

    Args:
        before: The model, or a program of it.
        after: What a compressor made of it: a program, or a finalized module.
        data: Inputs of one call each, as for `as_batch`; with them outputs are compared, which shows
            where accuracy is lost.
        example_inputs: Inputs of one call, where a module has to be captured; the first of `data`, or
            those of the other program by default.

    Returns:
        One entry per weight that an op reads in both. Batch norms that were folded into `after` are
        folded into `before` first.

    Raises:
        InputError: The two have no op in common or are not of one model, or data do not fit.

    Examples:
        >>> difference = diff(program, compressed, batches)
        >>> [(layer.name, layer.output_sqnr > 10) for layer in difference.layers]
        [('0.weight', True), ('2.weight', True)]
    """
    batches = [] if data is None else [as_batch(each) for each in data]
    known = [each for each in (before, after) if isinstance(each, Program)]
    given: Batch | None = None
    if example_inputs is not None:
        given = as_batch(example_inputs)
    elif known:
        given = (known[0].example_args, known[0].example_kwargs)
    elif batches:
        given = batches[0]
    first, second = _captured(before, given), _captured(after, given)
    exact, found = first.graph_module, second.graph_module
    if _norms(found) < _norms(exact):
        exact = first.copy().graph_module
        run_passes(exact, [FoldBatchNorm(), RemoveUnused()])
    pairs = list(Correspondence.by_place(exact, found, _place).items())
    if not pairs:
        raise InputError("the two programs have no op with a weight in common")
    for one, other in pairs:
        shapes = [
            [tuple(each.meta["val"].shape) for each in _weight_operands(node)]
            for node in (one, other)
        ]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{one.name} has weights {shapes[0]} before and {shapes[1]} after: the second program"
                " is not made from the first"
            )
    measured = OutputErrors(exact, found, pairs)
    for batch in batches:
        measured.add(batch)
    stored = _storage(found)
    sizes = (stored_tensors(exact), stored_tensors(found))
    layers = [
        _layer((exact, found), operands, (one, other), stored, sizes, measured if batches else None)
        for one, other in pairs
        for operands in zip(_weight_operands(one), _weight_operands(other), strict=True)
    ]
    return Difference(tuple(layers), measured.totals() if batches else ())


def _captured(model: Any, example: Batch | None) -> Program:
    if isinstance(model, Program) or example is None:
        return as_program(model)
    return as_program(model, *example)


def _norms(gm: fx.GraphModule) -> int:
    return len(list(Editor(gm).calls(BATCH_NORM)))


def _place(node: fx.Node) -> tuple[str, str] | None:
    """Module and type of an op with a weight, None for other nodes."""
    if not _weight_operands(node):
        return None
    frames = module_frames(node)
    return frames[-1].name if frames else "", op_names(node)[0]


def _weight_operands(node: fx.Node) -> list[fx.Node]:
    """The weights of an op: one, or those of all gates and directions of a recurrent one."""
    found = [
        (operand, position)
        for operand, position, role, axis in state_operands(node)
        if role == "weight" and source_of(operand, axis) is not None
    ]
    recurrent = bool(found) and found[0][1] < 0
    return [operand for operand, _ in (found if recurrent else found[:1])]


def _storage(gm: fx.GraphModule) -> dict[str, tuple[str, int]]:
    """Dense node → how it is stored and with how many tables."""
    return {
        value.dense.name: (value.label, value.codes.tables)
        for value in stored_values(gm)
        if value.codes is not None
    }


def _layer(
    graphs: tuple[CapturedModule, CapturedModule],
    weights: tuple[fx.Node, fx.Node],
    ops: tuple[fx.Node, fx.Node],
    stored: dict[str, tuple[str, int]],
    tensors: tuple[dict[str, StoredTensor], dict[str, StoredTensor]],
    measured: OutputErrors | None,
) -> LayerDifference:
    with torch.no_grad():
        values = [constant_value(gm, node) for gm, node in zip(graphs, weights, strict=True)]
    kinds, tables = [], 0
    sizes = [_bytes(held, node) for held, node in zip(tensors, weights, strict=True)]
    for node in _chain(weights[1]):
        if node.name in stored:
            kinds.append(stored[node.name][0])
            tables = max(tables, stored[node.name][1])
        elif "sparse_to_dense" in str(node.target):
            kinds.append("sparse")
    source = str(values[0].dtype).removeprefix("torch.")
    kind = source if not kinds else f"{source} → {' '.join(kinds)}"
    output = own = None
    if measured is not None:
        output, own = measured.of(ops[0])
    return LayerDifference(
        name=weight_of(weights[0]),
        op=ops[0].name,
        op_type=op_names(ops[0])[0],
        shape=tuple(values[0].shape),
        dtype=kind,
        bits=8 * sizes[1] / max(values[0].numel(), 1),
        tables=tables,
        bytes_before=sizes[0],
        bytes_after=sizes[1],
        weight_sqnr=sqnr(*error_of(values[0], values[1])),
        output_sqnr=output,
        own_sqnr=own,
    )


def _chain(node: fx.Node) -> list[fx.Node]:
    if node.op == "get_attr":
        return [node]
    return [node, *(each for operand in operands(node) for each in _chain(operand))]


def _bytes(held: dict[str, StoredTensor], node: fx.Node) -> int:
    paths = {str(each.target) for each in _chain(node) if each.op == "get_attr"}
    return -(-sum(held[path].bits for path in paths) // 8)
