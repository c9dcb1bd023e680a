"""Cut a graph into blocks where little is alive: the units of reconstruction and of searches.

In topological order, the boundary behind a node is a cut where at most `width` *dirty* values are
still needed, a dirty value being one that depends on a compressed op. Values that do not (masks,
position tables) are exact in both models, so any block may read them. With width 1 these are the
nodes that post-dominate everything dirty before them, found in one scan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.ir.editor import operands

__all__ = ["Block", "cut_points", "find_blocks"]

_ANY = torch.empty(0)  # a node whose value is not described counts as a tensor


@dataclass(frozen=True)
class Block:
    """Consecutive nodes between two cuts.

    Attributes:
        nodes: In the order of the graph, without placeholders, constants and the output node.
        inputs: Dirty values from the blocks before.
        outputs: Dirty values that later blocks or the output read.
        targets: The nodes for which the block exists (compressed ops).
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    targets: tuple[fx.Node, ...]


def cut_points(
    graph: fx.Graph, is_target: Callable[[fx.Node], bool], *, width: int = 1
) -> list[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """Nodes behind which at most `width` dirty values are alive, with those values.

    Args:
        graph: Any graph in topological order.
        is_target: Which nodes are compressed: they and everything that depends on them are dirty.
        width: Largest number of values at a cut.
    """
    order = list(graph.nodes)
    place = {node: number for number, node in enumerate(order)}
    dirty: set[fx.Node] = set()
    last: dict[fx.Node, int] = {}
    cuts: list[tuple[fx.Node, tuple[fx.Node, ...]]] = []
    live: list[fx.Node] = []
    for number, node in enumerate(order):
        live = [value for value in live if last[value] > number]
        if node.op != "output" and (
            is_target(node) or any(operand in dirty for operand in operands(node))
        ):
            dirty.add(node)
            last[node] = max((place[user] for user in node.users), default=-1)
            if last[node] > number:
                live.append(node)
        whole = all(isinstance(value.meta.get("val", _ANY), Tensor) for value in live)
        if live and whole and len(live) <= width and node in dirty:
            cuts.append((node, tuple(live)))
    return cuts


def find_blocks(
    graph: fx.Graph,
    is_target: Callable[[fx.Node], bool],
    *,
    width: int = 1,
    min_targets: int = 1,
) -> list[Block]:
    """Blocks between cuts, each with at least `min_targets` compressed ops.

    Cuts without a target between them are merged, so that a block ends where what follows its last
    target (a norm, an activation) ends too.

    Args:
        graph: Any graph in topological order.
        is_target: Which nodes are compressed.
        width: Largest number of values between two blocks.
        min_targets: Fewest targets of a block; blocks of one layer are cut finer than blocks of two.

    Returns:
        Blocks in order; together they hold every dirty node.
    """
    order = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    cuts = dict(cut_points(graph, is_target, width=width))
    starts: list[int] = []  # places in `order` behind which a block ends
    ends: list[tuple[fx.Node, ...]] = []
    targets = 0
    for number, node in enumerate(order):
        if is_target(node):
            targets += 1
        if node not in cuts or targets < min_targets:
            continue
        starts.append(number)
        ends.append(cuts[node])
        upcoming = order[number + 1 :]
        following = next((other for other in upcoming if other in cuts or is_target(other)), None)
        if following is not None and not is_target(following):
            starts.pop()
            ends.pop()
            continue
        targets = 0
    return _build(graph, order, starts, ends, is_target, min_targets)


def _dirty(graph: fx.Graph, is_target: Callable[[fx.Node], bool]) -> set[fx.Node]:
    dirty: set[fx.Node] = set()
    for node in graph.nodes:
        if is_target(node) or any(operand in dirty for operand in operands(node)):
            dirty.add(node)
    return dirty


def _build(
    graph: fx.Graph,
    order: list[fx.Node],
    starts: list[int],
    ends: list[tuple[fx.Node, ...]],
    is_target: Callable[[fx.Node], bool],
    min_targets: int,
) -> list[Block]:
    dirty = _dirty(graph, is_target)
    result = next(node for node in graph.nodes if node.op == "output")
    returned = tuple(dict.fromkeys(node for node in operands(result) if node in dirty))
    if not starts or starts[-1] < len(order) - 1:
        remaining = order[(starts[-1] + 1 if starts else 0) :]
        targets = sum(map(is_target, remaining))
        if not starts or targets >= min_targets:
            starts.append(len(order) - 1)
            ends.append(returned)
        else:
            # what follows the last target belongs to its block
            starts[-1], ends[-1] = len(order) - 1, returned
    blocks: list[Block] = []
    begin = 0
    entering: tuple[fx.Node, ...] = ()
    for stop, leaving in zip(starts, ends, strict=True):
        nodes = tuple(order[begin : stop + 1])
        inside = tuple(node for node in nodes if is_target(node))
        blocks.append(Block(nodes, entering, leaving, inside))
        begin, entering = stop + 1, leaving
    return blocks
