"""Partitions that would wait for one another are cut, and nothing else is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.partitioner import Partition

import graphopt
from graphopt.backends.executorch.partitioner import cut_circles

SEEDS = range(80)


def random_graph(rng: random.Random) -> tuple[fx.Graph, list[fx.Node]]:
    """Sums of earlier values, two of each."""
    graph = fx.Graph()
    values = [graph.placeholder("x"), graph.placeholder("y")]
    for _ in range(rng.randint(4, 14)):
        values.append(graph.call_function(torch.add, tuple(rng.sample(values, 2))))
    graph.output(values[-1])
    return graph, values[2:]


def has_order(graph: fx.Graph, parts: list[frozenset[fx.Node]]) -> bool:
    """Whether all can be computed, each part at once, by trying what is ready."""
    of = {node: part for part in parts for node in part}
    left = {of.get(node, frozenset({node})) for node in graph.nodes}
    done: set[fx.Node] = set()
    while left:
        ready = [
            part
            for part in left
            if all(used in done or used in part for n in part for used in n.all_input_nodes)
        ]
        if not ready:
            return False
        for part in ready:
            done |= part
            left.discard(part)
    return True


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_can_be_computed_in_turn(seed: int) -> None:
    rng = random.Random(seed)
    graph, nodes = random_graph(rng)
    colors = [rng.randrange(4) for _ in nodes]
    parts = [
        frozenset(n for n, color in zip(nodes, colors, strict=True) if color == wanted)
        for wanted in range(3)
    ]
    parts = [part for part in parts if part]
    # neighbours in one part that stay together, as ops and their roundings do
    groups = [
        {node, used}
        for node in nodes
        for used in node.all_input_nodes[:1]
        if seed % 2 and any({node, used} <= part for part in parts)
    ]
    groups = [
        group for i, group in enumerate(groups) if not any(group & other for other in groups[:i])
    ]
    cut = cut_circles(graph, parts, groups)
    assert has_order(graph, cut)
    if has_order(graph, parts):
        assert cut == parts
    for group in groups:
        assert all(group <= part or not group & part for part in cut)
    assert all(any(part <= whole for whole in parts) for part in cut)
    if has_order(graph, [frozenset(group) for group in groups]):
        assert frozenset().union(*cut) == frozenset().union(*parts)


def test_nothing_waits_for_weights_in_a_part() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    words = graph.call_function(torch.embedding, (weight, x))
    scores = graph.call_function(torch.matmul, (words, weight))
    graph.output(scores)
    parts = [frozenset({weight, scores})]
    assert cut_circles(graph, parts, [parts[0]]) == parts


class Crossed(nn.Module):
    """Two chains, each of which waits for a half of the other, through ops that are not delegated."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first, second = self.layers[0](x), self.layers[1](y)
        to_second, to_first = torch.flip(first, [0]), torch.flip(second, [0])
        return self.layers[2](to_first) + torch.flip(self.layers[3](to_second), [1])


def crossed_partitions(gm: fx.GraphModule, groups: list[list[fx.Node]]) -> list[Partition]:
    """Of the four layers, the first with the third and the second with the last."""
    layers = [group for group in groups if any("linear" in str(node.target) for node in group)]
    assert len(layers) == 4
    return [Partition(id=i, nodes=[*layers[i], *layers[i + 2]]) for i in range(2)]


@pytest.mark.integration
@pytest.mark.executorch
def test_chains_that_cross_are_saved_and_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canonical = "executorch.exir.backend.canonical_partitioners"
    merged = f"{canonical}.pattern_op_partitioner.generate_grouped_partitions_from_list_of_nodes"
    monkeypatch.setattr(merged, crossed_partitions)
    call = (torch.randn(4, 8), torch.randn(4, 8))
    artifact = graphopt.lower(graphopt.capture(Crossed().eval(), call), "executorch")
    artifact.save(tmp_path / "net.pte")
    assert artifact.verification.max_error < 1e-6


@pytest.mark.integration
@pytest.mark.executorch
def test_weights_that_words_and_scores_share_are_saved_and_right(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(32, 16)
            self.hidden = nn.Linear(16, 16)
            self.scores = nn.Linear(16, 32, bias=False)
            self.scores.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.scores(torch.relu(self.hidden(self.words(ids))))

    call = (torch.randint(0, 32, (2, 5)),)
    artifact = graphopt.lower(graphopt.capture(Tied().eval(), call), "executorch")
    artifact.save(tmp_path / "net.pte")
    assert artifact.verification.max_error < 1e-6
