"""Cuts are where few compressed values are alive: dominators of random graphs."""

from __future__ import annotations

import random

import networkx as nx
import pytest
import torch
from helpers.cut_graphs import (
    SINK,
    SOURCE,
    by_definition,
    chain,
    check_blocks,
    compress,
    cuts_of,
    dirty_flow,
    dirty_nodes,
    dominating,
    graph_of,
    is_compressed,
    is_layer,
    post_dominating,
)
from torch import fx, nn

from graphopt.analysis.partition import cut_points, find_blocks


def mix(*values: object) -> object:
    return values


def random_graph(seed: int, *, roots: int, dead: bool = False) -> fx.Graph:
    """A DAG of up to 30 nodes whose readers are mostly near; `roots` targets may read the inputs."""
    rng = random.Random(seed)
    graph = fx.Graph()
    clean = [graph.placeholder("x"), graph.get_attr("c")]
    dirty: list[fx.Node] = []
    for _ in range(rng.randint(4, 30)):
        target = compress if rng.random() < 0.3 else mix
        near = dirty[-rng.choice([1, 1, 2, 4]) :]
        if not dirty or (target is compress and roots > 1 and rng.random() < 0.2):
            read = rng.sample(clean, 1)
            roots -= target is compress
        else:
            read = rng.sample(near, rng.randint(1, min(2, len(near))))
            read += rng.sample(clean, rng.random() < 0.2)
        made = graph.call_function(target, tuple(read))
        is_dirty = target is compress or any(each in dirty for each in read)
        (dirty if is_dirty else clean).append(made)
    ends = [node for node in graph.nodes if not node.users and node.op == "call_function"]
    if dead:
        ends = rng.sample(ends, rng.randint(1, len(ends)))
    graph.output(tuple(ends) if len(ends) > 1 or rng.random() < 0.5 else ends[0])
    graph.lint()
    return graph


def test_random_graphs_have_cuts_and_places_without() -> None:
    counts = []
    for seed in range(200):
        graph = random_graph(seed, roots=1)
        dirty = dirty_nodes(graph, is_compressed)
        counts.append((len(cuts_of(graph, is_compressed)), len(dirty)))
    assert sum(0 < cuts < dirty - 1 for cuts, dirty in counts) > 100
    assert max(cuts for cuts, _ in counts) > 5


def test_cuts_of_width_one_are_the_dominators_of_what_is_dirty() -> None:
    for seed in range(200):
        graph = random_graph(seed, roots=1)
        expected = dominating(graph, is_compressed)
        found = cuts_of(graph, is_compressed)
        assert set(found) == expected, seed
        assert all(live == {node} for node, live in found.items())


def test_dominators_from_the_source_are_post_dominators_from_the_sink() -> None:
    for seed in range(50):
        graph = random_graph(seed, roots=3)
        flow = dirty_flow(graph, is_compressed)
        turned = set(chain(nx.immediate_dominators(flow.reverse(), SINK), SOURCE))
        assert turned - {SOURCE, SINK} == dominating(graph, is_compressed)


def test_a_cut_post_dominates_what_is_dirty_before_it() -> None:
    for seed in range(200):
        graph = random_graph(seed, roots=4)
        assert set(cuts_of(graph, is_compressed)) == post_dominating(graph, is_compressed), seed


@pytest.mark.parametrize("width", [1, 2, 3])
def test_cuts_are_the_boundaries_with_few_dirty_values_alive(width: int) -> None:
    for seed in range(200):
        graph = random_graph(seed, roots=3, dead=seed % 2 == 1)
        expected = by_definition(graph, is_compressed, width)
        assert cuts_of(graph, is_compressed, width) == expected, seed


@pytest.mark.parametrize("width", [1, 2, 3])
def test_blocks_cover_every_node_and_hand_on_what_the_next_reads(width: int) -> None:
    for seed in range(200):
        graph = random_graph(seed, roots=3, dead=seed % 2 == 1)
        if not dirty_nodes(graph, is_compressed):
            continue
        check_blocks(graph, is_compressed, find_blocks(graph, is_compressed, width=width))


@pytest.mark.parametrize("last", [False, True])
def test_what_the_model_returns_uncompressed_is_no_output_of_a_block(last: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    early = graph.call_function(mix, (x,))
    y = graph.call_function(compress, (x,))
    late = graph.call_function(mix, (x,))
    graph.output((y, late if last else early, x))
    if not last:
        graph.erase_node(late)
    (block,) = find_blocks(graph, is_compressed)
    assert block.outputs == (y,)


@pytest.mark.parametrize("least", [1, 2, 3])
def test_every_block_before_the_last_has_its_share_of_targets(least: int) -> None:
    for seed in range(200):
        graph = random_graph(seed, roots=1)
        blocks = find_blocks(graph, is_compressed, min_targets=least)
        assert all(len(block.targets) >= least for block in blocks[:-1]), seed


@pytest.mark.parametrize("least", [1, 2, 3])
def test_the_last_block_has_its_share_of_targets(least: int) -> None:
    for seed in range(200):
        graph = random_graph(seed, roots=1)
        total = sum(map(is_compressed, graph.nodes))
        blocks = find_blocks(graph, is_compressed, min_targets=least)
        assert len(blocks[-1].targets) >= min(least, total), seed


def test_blocks_are_as_fine_as_the_cuts_allow() -> None:
    for seed in range(200):
        graph = random_graph(seed, roots=1)
        order = [node for node in graph.nodes if node in dirty_nodes(graph, is_compressed)]
        cuts = dominating(graph, is_compressed)
        # targets between two cuts share a block, others do not
        groups = [0]
        for node in order:
            groups[-1] += is_compressed(node)
            if node in cuts:
                groups.append(0)
        expected = [count for count in groups if count]
        found = [len(block.targets) for block in find_blocks(graph, is_compressed)]
        assert found == (expected or [0]), seed


def test_a_layer_takes_its_norm_and_activation_along() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Sigmoid()]
    graph = graph_of(nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8))
    first, second = find_blocks(graph, is_layer)
    assert "relu" in str(first.nodes[-1].target)
    assert [str(node.target).split(".")[1] for node in second.nodes] == ["conv2d", "sigmoid"]


def test_a_graph_without_targets_is_one_block() -> None:
    graph = graph_of(nn.Sequential(nn.ReLU(), nn.Sigmoid()), torch.randn(2, 3))
    assert cut_points(graph, is_layer) == []
    (block,) = find_blocks(graph, is_layer)
    assert len(block.nodes) == 2
    assert block.targets == ()
