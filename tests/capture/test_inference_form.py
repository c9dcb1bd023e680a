"""Graphs that are captured without being traced again have the form of those that are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.capture.inference_form import is_plain
from graphopt.ir.annotations import dropout_rate


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.fc(self.drop(F.adaptive_avg_pool2d(y, 1).flatten(1)))


class InPlace(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=True)


X = torch.randn(2, 3, 9, 9)


@pytest.mark.parametrize(("kind", "plain"), [(Plain, True), (InPlace, False)])
def test_only_graphs_without_mutation_are_plain(kind: type[Plain], plain: bool) -> None:
    exported = torch.export.export(kind().eval(), (X,))
    assert is_plain(exported.graph) == plain
    captured = graphopt.capture(kind().eval(), (X,)).graph_module
    mutating = [n for n in captured.graph.nodes if str(n.target).endswith("_.default")]
    assert not mutating


def test_norms_in_training_are_not_plain() -> None:
    assert not is_plain(torch.export.export(Plain().train(), (X,)).graph)


@pytest.mark.parametrize("kind", [Plain, InPlace])
def test_norms_have_their_inference_op_and_dropouts_their_rate(kind: type[Plain]) -> None:
    model = kind().eval()
    gm = graphopt.capture(model, (X,)).graph_module
    targets = [str(node.target) for node in gm.graph.nodes]
    assert targets.count("aten._native_batch_norm_legit_no_training.default") == 1
    assert not any("dropout" in target for target in targets)
    rates = [dropout_rate(node) for node in gm.graph.nodes]
    assert [rate for rate in rates if rate] == ([0.3] if kind is Plain else [])
    torch.testing.assert_close(gm(X), model(X), rtol=0, atol=0)
    # metadata as every pass expects it
    for node in gm.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta
            assert "nn_module_stack" in node.meta or str(node.target).startswith(("aten.sym", "<"))


def test_loaded_programs_keep_the_rate_too(tmp_path: object) -> None:
    exported = torch.export.export(Plain().eval(), (X,))
    before = [str(node.target) for node in exported.graph.nodes]
    gm = graphopt.capture(exported).graph_module
    assert [n for n in gm.graph.nodes if dropout_rate(n) == 0.3]
    assert before == [str(node.target) for node in exported.graph.nodes]


class Written(nn.Module):
    """Writes into parts of values: the same type and size, others, and one that broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        y = self.fc(x)
        z = y.clone()
        z[:, 0] = y[:, 1] * 2
        z[:, 2:4] = y[:, :1]
        z[1] = given
        z[:, 5:].copy_(torch.ones(1))
        return z * y


def test_writes_into_parts_of_values_can_be_derived() -> None:
    torch.manual_seed(0)
    model, x = Written().eval(), (torch.randn(4, 6), torch.arange(6))
    program = graphopt.capture(model, x)
    other = (torch.randn(7, 6), torch.arange(6) + 2)
    found, wanted = program.module()(*other), model(*other)
    assert torch.equal(found, wanted)
    parameters = list(program.graph_module.parameters())
    gradients = torch.autograd.grad(program.graph_module(*other).square().sum(), parameters)
    expected = torch.autograd.grad(wanted.square().sum(), list(model.parameters()))
    for one, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, want)
