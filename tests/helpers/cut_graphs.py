"""Graphs with layers that are compressed, and their cuts by definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import networkx as nx
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt.analysis.partition import Block, cut_points
from graphopt.ir.editor import operands

aten = torch.ops.aten


IsTarget = Callable[[fx.Node], bool]


TARGETS = (aten.conv2d.default, aten.conv1d.default, aten.linear.default, aten.embedding.default)


SOURCE, SINK = "source", "sink"


def is_layer(node: fx.Node) -> bool:
    return node.target in TARGETS


def compress(*values: object) -> object:
    return values


def is_compressed(node: fx.Node) -> bool:
    return node.target is compress


def dirty_nodes(graph: fx.Graph, is_target: IsTarget) -> set[fx.Node]:
    flow = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((used, node) for node in graph.nodes for used in operands(node))
    targets = [node for node in graph.nodes if is_target(node)]
    found = set(targets).union(*(nx.descendants(flow, target) for target in targets))
    return {node for node in found if node.op != "output"}


def dirty_flow(graph: fx.Graph, is_target: IsTarget) -> nx.DiGraph:
    """What is dirty, from a source that feeds all roots to a sink, the output."""
    dirty = dirty_nodes(graph, is_target)
    flow = nx.DiGraph()
    flow.add_nodes_from([SOURCE, SINK, *dirty])
    for node in graph.nodes:
        used = [each for each in operands(node) if each in dirty]
        if node.op == "output":
            flow.add_edges_from((each, SINK) for each in used)
        elif node in dirty:
            flow.add_edges_from((each, node) for each in used or [SOURCE])
    return flow


def chain(idom: dict[object, object], node: object) -> Iterator[object]:
    """A node and its dominators."""
    yield node
    while node in idom and idom[node] is not None and idom[node] != node:
        node = idom[node]
        yield node


def dominating(graph: fx.Graph, is_target: IsTarget) -> set[fx.Node]:
    """Nodes that dominate or post-dominate every dirty node: all paths lead through them."""
    flow = dirty_flow(graph, is_target)
    before = nx.immediate_dominators(flow, SOURCE)
    return {node for node in chain(before, SINK) if isinstance(node, fx.Node)}


def post_dominating(graph: fx.Graph, is_target: IsTarget) -> set[fx.Node]:
    """Nodes that every path to the output passes from whatever is dirty and comes before them."""
    flow = dirty_flow(graph, is_target)
    after = nx.immediate_dominators(flow.reverse(), SINK)
    dirty = [node for node in graph.nodes if node in flow]
    passed = {node: set(chain(after, node)) for node in dirty}
    return {
        node
        for number, node in enumerate(dirty)
        if all(node in passed[earlier] for earlier in dirty[:number])
    }


def holds_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val", torch.empty(0)), Tensor)


def cuts_of(graph: fx.Graph, is_target: IsTarget, width: int = 1) -> dict[fx.Node, set[fx.Node]]:
    found = cut_points(graph, is_target, width=width)
    assert len({node for node, _ in found}) == len(found)
    assert all(len(set(live)) == len(live) for _, live in found)
    return {node: set(live) for node, live in found}


def by_definition(graph: fx.Graph, is_target: IsTarget, width: int) -> dict[fx.Node, set[fx.Node]]:
    """For each boundary, the dirty values before it that something behind it reads."""
    order = list(graph.nodes)
    dirty = dirty_nodes(graph, is_target)
    found = {}
    for number, node in enumerate(order):
        behind = set(order[number + 1 :])
        live = {each for each in order[: number + 1] if each in dirty and behind & set(each.users)}
        if node in dirty and 1 <= len(live) <= width and all(map(holds_tensor, live)):
            found[node] = live
    return found


def check_blocks(graph: fx.Graph, is_target: IsTarget, blocks: list[Block]) -> None:
    order = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    dirty = dirty_nodes(graph, is_target)
    assert [node for block in blocks for node in block.nodes] == order
    targets = [node for block in blocks for node in block.targets]
    assert targets == [node for node in order if is_target(node)]
    assert blocks[0].inputs == ()
    for block, following in pairwise(blocks):
        assert block.outputs == following.inputs
    (result,) = graph.find_nodes(op="output")
    for number, block in enumerate(blocks):
        own = set(block.nodes)
        read = {each for node in block.nodes for each in operands(node) if each in dirty}
        assert read - own <= set(block.inputs)
        later = {each for other in blocks[number + 1 :] for each in other.nodes} | {result}
        needed = {each for each in own | set(block.inputs) if each in dirty}
        given = set(block.outputs) if number + 1 < len(blocks) else set(block.outputs) & dirty
        assert {each for each in needed if later & set(each.users)} == given


def graph_of(model: nn.Module, *args: Tensor) -> fx.Graph:
    graph = graphopt.capture(model, args, dynamic_shapes=None).copy().graph_module.graph
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op == "call_function":
            graph.erase_node(node)  # checks of types
    return graph
