"""Rows of weights that were pruned before their values were compressed."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import fx

from graphopt.analysis.weights import WeightTensor
from graphopt.ir.annotations import record_of
from graphopt.ir.records import TensorRecord

__all__ = ["of_whole_weight"]

_VALUES = "_values"


def of_whole_weight(gm: fx.GraphModule, weight: WeightTensor, row: TensorRecord) -> TensorRecord:
    """The row of a pruned weight whose values became `row`; any other row as it is."""
    if weight.sparse is None:
        return row
    name = row.name.removesuffix(_VALUES)
    shape = tuple(int(size) for size in weight.sparse.args[2])  # type: ignore[union-attr,arg-type]
    mask_bits = 8 * -(-math.prod(shape) // 8)
    known = record_of(gm)
    pruned = next((each for each in known.rows if each.name == name), None)
    zeros = 1 - math.prod(row.shape) / max(math.prod(shape), 1)
    share = pruned.detail if pruned is not None else f"{100 * zeros:.1f} % zeros"
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
        stored_bits=row.stored_bits + mask_bits,
    )
