"""Cuts are where few compressed values are alive: dominators of what is compressed, by networkx."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise

import networkx as nx
import pytest
import torch
import zoo
from torch import Tensor, fx, nn

import graphopt
from graphopt.analysis.partition import Block, cut_points, find_blocks
from graphopt.ir.editor import operands

aten = torch.ops.aten
IsTarget = Callable[[fx.Node], bool]
TARGETS = (aten.conv2d.default, aten.conv1d.default, aten.linear.default, aten.embedding.default)
SOURCE, SINK = "source", "sink"


def is_layer(node: fx.Node) -> bool:
    return node.target in TARGETS


def mix(*values: object) -> object:
    return values


def compress(*values: object) -> object:
    return values


def is_compressed(node: fx.Node) -> bool:
    return node.target is compress


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


# ------------------------------------------------------------------------------ captured models
def graph_of(model: nn.Module, *args: Tensor) -> fx.Graph:
    graph = graphopt.capture(model, args, dynamic_shapes=None).copy().graph_module.graph
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op == "call_function":
            graph.erase_node(node)  # checks of types
    return graph


@cache
def zoo_graph(name: str) -> fx.Graph:
    model, args = zoo.MODELS[name]()
    return graph_of(model, *args)


NAMES = ["resnet", "edsr", "llama", "lstm"]


@pytest.mark.parametrize("name", NAMES)
def test_cuts_of_models_are_the_dominators(name: str) -> None:
    graph = zoo_graph(name)
    found = cuts_of(graph, is_layer)
    # between an op with several results and the one that is read, nothing is cut
    assert set(found) == set(filter(holds_tensor, dominating(graph, is_layer)))
    assert found == by_definition(graph, is_layer, 1)


def test_cuts_of_a_model_with_several_embeddings_are_the_post_dominators() -> None:
    graph = zoo_graph("bert")
    found = cuts_of(graph, is_layer)
    assert set(found) == post_dominating(graph, is_layer) > dominating(graph, is_layer)
    assert found == by_definition(graph, is_layer, 1)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("name", [*NAMES, "bert"])
def test_blocks_of_models_cover_them(name: str, width: int) -> None:
    graph = zoo_graph(name)
    blocks = find_blocks(graph, is_layer, width=width)
    assert len(blocks) > 1
    check_blocks(graph, is_layer, blocks)


def inside(node: fx.Node, kind: str) -> str:
    """Path of the module of this class around a node, or ""."""
    stack = node.meta.get("nn_module_stack") or {}
    found = [path for path, each in stack.values() if str(each).split(".")[-1].startswith(kind)]
    return found[-1] if found else ""


def last_nodes(graph: fx.Graph, kind: str) -> dict[str, fx.Node]:
    return {path: node for node in graph.nodes if (path := inside(node, kind))}


def test_every_residual_block_of_a_resnet_ends_in_a_cut() -> None:
    graph = zoo_graph("resnet")
    ends = last_nodes(graph, "ResNetBottleNeckLayer")
    assert len(ends) == 5
    cuts = cuts_of(graph, is_layer)
    assert set(ends.values()) <= set(cuts)
    for path in ends:
        within = [node for node in cuts if inside(node, "ResNetBottleNeckLayer") == path]
        # in front of the addition nothing but its last nodes is a cut
        assert all("relu" in str(n.target) or "add" in str(n.target) for n in within), path


@pytest.mark.parametrize(
    ("name", "layer", "half"),
    [("llama", "LlamaDecoderLayer", "add"), ("bert", "BertLayer", "layer_norm")],
)
def test_attention_and_feed_forward_halves_are_apart(name: str, layer: str, half: str) -> None:
    graph = zoo_graph(name)
    cuts = cuts_of(graph, is_layer)
    layers = last_nodes(graph, layer)
    assert len(layers) == 2
    attention = last_nodes(graph, "LlamaAttention" if name == "llama" else "BertSelfAttention")
    order = {node: number for number, node in enumerate(graph.nodes)}
    halves: list[list[fx.Node]] = []
    for path in layers:
        own = [node for node in cuts if inside(node, layer) == path]
        ends = [node for node in own if half in str(node.target)]
        assert len(ends) == 2, path
        (middle,) = [end for at, end in attention.items() if at.startswith(path)]
        assert order[middle] < order[ends[0]] < order[ends[1]]
        halves.append(ends)
    blocks = find_blocks(graph, is_layer)
    counts = [len(block.targets) for block in blocks]
    assert any(count >= 3 for count in counts)
    ends_of_blocks = {block.outputs[0] for block in blocks}
    # masks, angles and positions are no obstacle: a block ends between the halves
    assert all(len(ends) == 2 for ends in halves)
    assert len(ends_of_blocks) == len(blocks)


def test_values_that_no_target_reaches_do_not_count() -> None:
    graph = zoo_graph("llama")
    first = next(iter(last_nodes(graph, "LlamaDecoderLayer")))

    def within(cuts: dict[fx.Node, set[fx.Node]]) -> list[fx.Node]:
        return [node for node in cuts if inside(node, "LlamaDecoderLayer") == first]

    # with masks and angles counted, nothing in a layer is a cut
    assert not within(cuts_of(graph, lambda _: True))
    assert len(within(cuts_of(graph, is_layer))) == 2


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.enc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.down, self.mid = nn.Conv2d(4, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enc(self.stem(x).relu()).relu()
        low = self.mid(self.down(skip).relu()).relu()
        up = nn.functional.interpolate(self.up(low), scale_factor=2.0)
        return self.head(torch.cat([skip, up], 1))


def test_two_values_wide_cuts_go_through_a_unet() -> None:
    graph = graph_of(UNet(), torch.randn(2, 3, 8, 8))
    order = list(graph.nodes)
    skip = next(node for node in order if len(node.users) > 1 and "relu" in str(node.target))
    joint = next(node for node in order if "cat" in str(node.target))
    within = set(order[order.index(skip) + 1 : order.index(joint)])
    narrow, wide = cuts_of(graph, is_layer, 1), cuts_of(graph, is_layer, 2)
    assert not within & set(narrow)
    crossing = {node: live for node, live in wide.items() if node in within}
    assert len(crossing) >= 5
    assert all(live == {skip, node} for node, live in crossing.items())
    assert [len(b.targets) for b in find_blocks(graph, is_layer)] == [1, 1, 3, 1]
    assert [len(b.targets) for b in find_blocks(graph, is_layer, width=2)] == [1] * 6


def test_branches_that_read_one_input_are_one_block() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(compress, (x,))
    left = graph.call_function(compress, (first,))
    right = graph.call_function(compress, (first,))
    total = graph.call_function(operator.add, (left, right))
    graph.output(total)
    assert set(cuts_of(graph, is_compressed)) == {first, total}
    assert [block.targets for block in find_blocks(graph, is_compressed)] == [
        (first,),
        (left, right),
    ]
