"""Labels of channels behind views: what the op itself does with labels that are written out in full."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.analysis.channel_labels import labels_behind, labels_of

SHAPE = (2, 3, 12)  # a batch, positions, channels
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads": lambda x: x.view(2, 3, 4, 3),
    "turned heads": lambda x: x.view(2, 3, 4, 3).permute(2, 0, 3, 1),
    "heads beside the batch": lambda x: x.view(2, 3, 4, 3).transpose(1, 2).reshape(8, 3, 3),
    "there and back": lambda x: x.reshape(6, 2, 6).mT.reshape(2, 3, 6, 2).mT.flatten(2),
    "a part": lambda x: x.view(2, 3, 3, 4)[:, :, 1],
    "every other channel": lambda x: x[..., 1:11:2],
    "fewer positions": lambda x: x[:, 1:].unsqueeze(1).squeeze(1),
    "repeated heads": lambda x: (
        x.view(2, 3, 4, 3)[:, :, :, None].expand(2, 3, 4, 5, 3).reshape(2, 3, 20, 3)
    ),
    "third of a split": lambda x: x.split([2, 3, 7], 2)[2],
    "second of an unbinding": lambda x: x.view(2, 3, 2, 6).unbind(2)[1],
    "ReLU and a copy": lambda x: torch.relu(x).clone(),
}


class Views(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return VIEWS[self.name](x)


@pytest.mark.parametrize("name", VIEWS)
def test_labels_are_those_of_every_element(name: str) -> None:
    gm = graphopt.capture(Views(name), (torch.ones(SHAPE),), dynamic_shapes=None).graph_module
    (node,) = gm.graph.find_nodes(op="placeholder")
    labels = labels_of(12, 2, 3)
    full = labels.expand(SHAPE)
    while (user := next(iter(node.users))).op != "output":
        found = labels_behind(user, node, labels)
        assert found is not None, user
        node, labels = user, found
    want = VIEWS[name](full)
    assert torch.equal(labels.expand(want.shape), want)
    assert 2 * labels.numel() <= want.numel()  # positions are left out


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(2, 3, 4, 3).sum(2),
        lambda x: torch.softmax(x, -1),
        lambda x: x + 1.0,
        lambda x: x.flip(-1),
        lambda x: x @ x.mT,
    ],
)
def test_other_ops_end_labels(function: Callable[[Tensor], Tensor]) -> None:
    VIEWS["other"] = function
    gm = graphopt.capture(Views("other"), (torch.ones(SHAPE),), dynamic_shapes=None).graph_module
    del VIEWS["other"]
    (node,) = gm.graph.find_nodes(op="placeholder")
    labels: Tensor | None = labels_of(12, 2, 3)
    while labels is not None and (user := next(iter(node.users))).op != "output":
        node, labels = user, labels_behind(user, node, labels)
    assert labels is None
