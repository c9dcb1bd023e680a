"""XNNPACK's partitioner, whose partitions never wait for one another in a circle.

ExecuTorch merges partitions where no path leads out of the two and back. Two that are merged apart may still
each have a part that the other one waits for, and then no order of calls is left. Such partitions are cut
where the values come back.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx
from torch.fx.passes.infra.partitioner import Partition

from graphopt.backends.executorch.partition import partition_configs
from graphopt.extras import deferred

if TYPE_CHECKING:
    import networkx as nx
else:
    nx = deferred("networkx")

__all__ = ["cut_circles", "xnnpack_partitioner"]

Nodes = frozenset[fx.Node]


def xnnpack_partitioner() -> Any:
    """A new partitioner, with rules that are repaired."""
    return _partitioner_class()(configs=list(partition_configs()))


@functools.cache
def _partitioner_class() -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.backend.canonical_partitioners import pattern_op_partitioner

    class Partitioner(XnnpackPartitioner):  # type: ignore[misc]
        def generate_partitions(self, ep: Any) -> list[Any]:
            groups = self.get_matched_nodes_from_configs(ep)
            merged = pattern_op_partitioner.generate_grouped_partitions_from_list_of_nodes
            proposed = merged(ep.graph_module, groups)
            whole = [frozenset(partition.nodes) for partition in proposed]
            parts = cut_circles(ep.graph, whole, groups)
            if parts == whole:
                return list(proposed)
            number = itertools.count()
            return [
                Partition(id=next(number), nodes=[n for n in ep.graph.nodes if n in part])
                for part in parts
            ]

    return Partitioner


def cut_circles(
    graph: fx.Graph, parts: Sequence[Nodes], groups: Iterable[Collection[fx.Node]]
) -> list[Nodes]:
    """Parts of a graph, cut so that they can be computed one after the other.

    Args:
        graph: A graph of values.
        parts: Disjoint sets of its nodes, each computed at once.
        groups: Nodes that stay together.

    Returns:
        The parts in their order, those that are cut as their first and second half; a part that
        cannot be cut is left out, so that its nodes are computed one by one.
    """
    unit_of = {node: frozenset(group) for group in groups for node in group}
    left = list(parts)
    while circle := _circle(graph, left):
        rounds = _rounds(graph, circle, unit_of)
        # the smallest that can be cut
        for part in sorted(circle, key=len):
            first = min((rounds[node] for node in part if node in rounds), default=0)
            late = frozenset(node for node in part if rounds.get(node, first) > first)
            if late:
                place = left.index(part)
                left[place : place + 1] = [part - late, late]
                break
        else:
            left.remove(min(circle, key=len))
    return left


def _joined(graph: fx.Graph, owner: dict[fx.Node, Any]) -> nx.DiGraph[Any]:
    """The graph with the nodes of each part as one; nothing waits for inputs and constants of a part."""
    joined = nx.DiGraph()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        for user in node.users:
            source, target = owner.get(node, node), owner.get(user, user)
            if source != target:
                joined.add_edge(source, target)
    return joined


def _circle(graph: fx.Graph, parts: Sequence[Nodes]) -> list[Nodes]:
    """Parts that wait for one another, of the first of these that is met; none where all is well."""
    owner = {node: part for part in parts for node in part}
    joined = _joined(graph, owner)
    for met in nx.strongly_connected_components(joined):
        if len(met) > 1:
            return [part for part in parts if part in met]
    return []


def _rounds(
    graph: fx.Graph, circle: Sequence[Nodes], unit_of: dict[fx.Node, Nodes]
) -> dict[fx.Node, int]:
    """How many times a value has come out of a part of the circle on its longest way to each node.

    Where a part has one number alone, all of it waits for the same others: in a circle some part has
    several, unless the groups themselves wait for one another; then nothing is returned.
    """
    part_of = {node: part for part in circle for node in part}
    unit_with = {node: unit_of.get(node, frozenset({node})) for node in part_of}
    units = _joined(graph, unit_with)
    try:
        order = list(nx.topological_sort(units))
    except nx.NetworkXUnfeasible:
        return {}
    part_with = {unit_with[node]: part for node, part in part_of.items()}
    rounds: dict[Any, int] = {}
    for unit in order:
        rounds[unit] = max(
            (
                rounds[source] + (part_with.get(source, part_with.get(unit)) != part_with.get(unit))
                for source in units.predecessors(unit)
            ),
            default=0,
        )
    return {node: rounds[unit] for node, unit in unit_with.items() if unit in rounds}
