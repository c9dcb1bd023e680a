"""Putting stored weights into a graph, and their rows into its record."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import fx

from graphopt.analysis.weights import WeightTensor, identity_of
from graphopt.ir.annotations import palette_annotation, record_of
from graphopt.ir.editor import Editor
from graphopt.ir.records import TensorRecord
from graphopt.schemes.base import StoredWeight
from graphopt.schemes.prune import zeros
from graphopt.schemes.sizes import mask_bits
from graphopt.specs.model import SpecModel

__all__ = ["replace_weight", "row_of"]

_VALUES = "_values"


def replace_weight(
    edit: Editor, weight: WeightTensor, stored: StoredWeight, spec: SpecModel
) -> TensorRecord:
    """Let the ops of a stored form take the place of a weight, under all its names.

    Args:
        edit: The editor.
        weight: What it replaces.
        stored: The stored form.
        spec: What it was made for.

    Returns:
        The weight's row of the record.
    """
    row = row_of(edit.gm, weight, stored, spec)
    dense = stored.emit(edit, weight.name, weight.nodes[0])
    for node in weight.nodes:
        edit.replace(node, dense)
    for path in (weight.name, *weight.aliases):
        edit.delete_constant(path)
    return row


def row_of(
    gm: fx.GraphModule, weight: WeightTensor, stored: StoredWeight, spec: SpecModel
) -> TensorRecord:
    """The record's row of a weight in a stored form; of pruned values, the row of the whole weight."""
    row = TensorRecord(
        **identity_of(weight),
        **stored.described(spec),
        stored_bits=stored.stored_bits(),
        snr_db=stored.snr_db,
    )
    annotation = palette_annotation(weight.nodes[0])
    if annotation is not None and annotation.note:
        row = replace(row, note="; ".join(filter(None, (row.note, annotation.note))))
    return row if weight.sparse is None else _of_whole_weight(gm, weight.sparse, row)


def _of_whole_weight(gm: fx.GraphModule, sparse: fx.Node, row: TensorRecord) -> TensorRecord:
    name = row.name.removesuffix(_VALUES)
    shape = tuple(int(size) for size in sparse.args[2])  # type: ignore[union-attr,arg-type]
    pruned = next((each for each in record_of(gm).rows if each.name == name), None)
    share = pruned.detail if pruned is not None else zeros(math.prod(row.shape), math.prod(shape))
    snr = row.snr_db
    if pruned is not None and pruned.snr_db is not None and snr is not None:
        # errors of what became zero and of what stays add up; the kept energy is almost all
        noise = 10 ** (-pruned.snr_db / 10) + 10 ** (-snr / 10)
        snr = math.inf if noise == 0 else -10 * math.log10(noise)
    return replace(
        row,
        name=name,
        shape=shape,
        detail=f"{share}, {row.detail}",
        snr_db=snr,
        stored_bits=row.stored_bits + mask_bits(shape),
    )
