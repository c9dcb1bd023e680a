"""Calibration data without data: random token ids for models that look tokens up.

Activations of a sentence encoder whose scales were found on random tokens lose 0.6 dB against those
found on text, and 9 dB less than those found on a single sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.errors import InputError
from graphopt.ir import op_info
from graphopt.ir.annotations import record
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.program import Program
from graphopt.run.batches import Batch, StatefulCall

__all__ = ["SYNTHETIC", "synthetic_calls", "varied_calls"]

SYNTHETIC = "synthetic"  # what people write in place of calibration data
_SEQUENCES = 64
_ADDED = 24  # random tokens for each column of embeddings beside narrow data, at least
_MOST_KEPT = 0.5  # share of tokens that are in every sequence; above, they say nothing
_ENDED = 8  # tokens of a sequence that has a beginning and an end
_SMALLEST = 16  # rows of a table that holds tokens; types and positions have fewer, or are given


def synthetic_calls(
    program: Program, *, sequences: int = _SEQUENCES, seed: int = 0
) -> list[dict[str, Any] | tuple[Any, ...]]:
    """Calls of a program with random tokens in the shapes of its example; other inputs stay as there.

    Tokens that every sequence of the example holds stay where they are, as beginnings, ends and padding do;
    of a single sequence its first and last one.

    The program's record gets a remark that says so.

    Args:
        program: With example inputs.
        sequences: Number of sequences in all.
        seed: Seed of the tokens.

    Returns:
        Inputs of one call each.

    Raises:
        InputError: The program has no integer input that is looked up in a table of tokens, takes
            floats as well, or has no example.
    """
    if not program.example_args and not program.example_kwargs:
        raise InputError("synthetic data take their shapes from example inputs, and there are none")
    leaves, spec = pytree.tree_flatten((tuple(program.example_args), dict(program.example_kwargs)))
    inputs = program.graph_module.graph.find_nodes(op="placeholder")
    floats = [
        str(node.target)
        for node, leaf in zip(inputs, leaves, strict=True)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 0
    ]
    rows = {node: _rows(node) for node in inputs}
    if floats or not any(rows.values()):
        what = f"{floats} hold floats" if floats else "no input is looked up in a table of tokens"
        raise InputError(
            f"there are no synthetic data for this model: {what}; give inputs of the kind that the"
            " model will see"
        )
    generator = torch.Generator().manual_seed(seed)
    batch = max(
        leaf.shape[0] if leaf.ndim else 1
        for node, leaf in zip(inputs, leaves, strict=True)
        if rows[node]
    )
    common = {
        node: _common_tokens([leaf])
        for node, leaf in zip(inputs, leaves, strict=True)
        if rows[node]
    }
    calls: list[dict[str, Any] | tuple[Any, ...]] = []
    for _ in range(math.ceil(sequences / max(batch, 1))):
        drawn = [
            _random_tokens(leaf, rows[node], common[node], generator) if rows[node] else leaf
            for node, leaf in zip(inputs, leaves, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(drawn, spec)
        calls.append(_as_inputs(program, args, kwargs))
    remark = f"calibrated on {len(calls) * batch} sequences of random tokens, not on data"
    record(program.graph_module, remarks=[remark])
    return calls


def varied_calls(
    gm: CapturedModule, calls: Sequence[Batch], *, seed: int = 0
) -> tuple[list[Batch], str]:
    """The same calls with random tokens, where their own are too few to tell apart what a layer reads.

    Fewer distinct tokens than an embedding has columns leave directions without any data: second moments
    of what layers read are singular, and what is fitted to them holds for these tokens alone. Masks,
    positions, states and shapes stay those of the data.

    Args:
        gm: A graph.
        calls: Inputs of one call each, as it takes them.
        seed: Seed of the tokens.

    Returns:
        As many sequences as there are, or a multiple that holds 24 tokens for each column, and a remark
        that says why; none, and "", where the data hold tokens enough, or no tokens.
    """
    nodes = gm.graph.find_nodes(op="placeholder")
    rows = [_rows(node) for node in nodes]
    most = max(rows, default=0)
    leaves = [pytree.tree_leaves((call[0], call[1])) for call in calls]
    if not most or any(len(each) != len(nodes) for each in leaves):
        return [], ""
    places = [place for place, size in enumerate(rows) if size == most]
    table = _table(nodes[places[0]])
    width = int(table.meta["val"].shape[1]) if table is not None else 0
    seen = [each[place].reshape(-1) for each in leaves for place in places]
    distinct = len(torch.cat(seen).unique()) if seen else 0
    if distinct >= min(width, most // 2):
        return [], ""
    generator = torch.Generator().manual_seed(seed)
    common = {place: _common_tokens([each[place] for each in leaves]) for place in places}
    sequences = sum(len(each[places[0]]) if each[places[0]].ndim > 1 else 1 for each in leaves)
    times = math.ceil(_ADDED * width / max(sum(map(len, seen)), 1))
    made: list[Batch] = []
    for _ in range(times):
        for call in calls:
            flat, spec = pytree.tree_flatten((call[0], call[1]))
            for place in places:
                flat[place] = _random_tokens(flat[place], most, common[place], generator)
            args, kwargs = pytree.tree_unflatten(flat, spec)
            batch: Batch = (tuple(args), dict(kwargs))
            made.append(
                StatefulCall(batch, call.state) if isinstance(call, StatefulCall) else batch
            )
    return made, (
        f"the data hold {distinct} distinct tokens for {width} columns of embeddings:"
        f" {times * sequences} sequences of random tokens were added"
    )


def _common_tokens(examples: Sequence[Tensor]) -> Tensor:
    """Tokens that every sequence holds: those that begin, end and fill up; of a single one its ends.

    What a model has learned about them (a norm's largest values stand there) no random token shows.
    """
    sequences = [
        row
        for example in examples
        for row in example.reshape(-1, example.shape[-1] if example.ndim else 1)
    ]
    first = sequences[0]
    common = first.unique()
    for row in sequences[1:]:
        common = common[torch.isin(common, row)]
    held = torch.cat([torch.isin(row, common) for row in sequences])
    if len(sequences) > 1 and float(held.float().mean()) <= _MOST_KEPT:
        return common
    return first[[0, -1]].unique() if len(first) >= _ENDED else first[:0]


def _random_tokens(like: Tensor, rows: int, kept: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens of a table in the places of others, those that are kept apart."""
    drawn = torch.randint(rows, like.shape, generator=generator).to(like.dtype)
    return torch.where(torch.isin(like, kept), like, drawn)


def _as_inputs(
    program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | tuple[Any, ...]:
    if not kwargs:
        return tuple(args)
    names = program.graph_module.graph._codegen.pytree_info.orig_args  # type: ignore[attr-defined]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _rows(node: fx.Node) -> int:
    """Rows of the table in which an integer input is looked up; 0 where there is none."""
    table = _table(node)
    size = 0 if table is None else int(table.meta["val"].shape[0])
    return size if size >= _SMALLEST else 0


def _table(node: fx.Node) -> fx.Node | None:
    """The table in which an integer input is looked up."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        return None
    front, seen = [node], {node}
    for reader in front:
        for user in reader.users:
            info = op_info.info_of(user)
            if info is None:
                continue
            for slot in info.weights:
                table = user.args[slot.position]
                looked_up = slot.matrix == "embedding" and user.args[slot.data] is reader
                if looked_up and isinstance(table, fx.Node):
                    return table
            passes = info.view is not None or info.cast
            if passes and user not in seen:
                seen.add(user)
                front.append(user)
    return None
