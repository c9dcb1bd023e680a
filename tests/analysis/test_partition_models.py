"""Cuts of networks: residual blocks, attention, U-nets."""

from __future__ import annotations

import operator
from functools import cache

import pytest
import torch
import zoo
from helpers.cut_graphs import (
    by_definition,
    check_blocks,
    compress,
    cuts_of,
    dominating,
    graph_of,
    holds_tensor,
    is_compressed,
    is_layer,
    post_dominating,
)
from torch import Tensor, fx, nn

from graphopt.analysis.partition import find_blocks


@cache
def zoo_graph(name: str) -> fx.Graph:
    model, args = zoo.MODELS[name]()
    return graph_of(model, *args)


NAMES = ["resnet", "edsr", "llama", "lstm"]


@pytest.mark.integration
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
