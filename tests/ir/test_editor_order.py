"""Weights are decoded where they are read, not in front of everything else."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt.ir.editor import Editor
from graphopt.palettization import KMeansPalettizer, KMeansPalettizerConfig


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)))


def decoding(graph: fx.Graph) -> list[fx.Node]:
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and "lut_to_dense" in str(node.target)
    ]


def test_each_weight_is_decoded_in_front_of_its_first_reader() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randint(0, 32, (2, 5))
    palettizer = KMeansPalettizer(model, KMeansPalettizerConfig.presets.w4())
    palettizer.prepare((x,))
    program = palettizer.program()
    graphs = [program.graph_module.graph, program.exported_program.graph]
    backends = graphopt.ExportBackend.CoreML, graphopt.ExportBackend.CoreAI
    graphs += [palettizer.finalize(backend=backend).graph for backend in backends]
    for graph in graphs:
        found = decoding(graph)
        assert len(found) == 5  # the head's is the embedding's
        for node in found:
            assert node.next in node.users
            assert node.next.op == "call_function"


def test_chains_of_constants_stay_in_order_and_others_stay_in_their_place() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.rand(3, 3)), nn.Parameter(torch.rand(3, 3))
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            total = self.a + self.b
            turned = total.t().exp()
            before = self.count * 2
            noise = torch.rand_like(self.a)
            self.count.add_(1)
            return (x @ x) @ turned + total + before + noise

    gm = graphopt.capture(Computed(), (torch.rand(3, 3),)).graph_module
    edit = Editor(gm)
    edit.delay_constants()
    assert not edit.changed
    gm.graph.lint()
    # what reads a tensor that is written, and what draws random numbers, is where it was
    computed = [node.name for node in gm.graph.nodes if node.op == "call_function"]
    expected = "mul rand_like add_1 matmul add t exp matmul_1 add_2 add_3 add_4 copy__default"
    assert computed == expected.split()
