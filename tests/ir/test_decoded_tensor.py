"""A parameter that is decoded when read behaves as the parameter that it stands for."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt.ir.decoded_tensor import DecodedTensor, settle, settled

VALUES = torch.arange(12.0).reshape(3, 4)


class Counted:
    """A stored form that counts how often it is decoded."""

    def __init__(self) -> None:
        self.decoded = 0

    def dense(self) -> Tensor:
        self.decoded += 1
        return VALUES.clone()


def made() -> tuple[DecodedTensor, Counted]:
    source = Counted()
    return nn.Parameter(DecodedTensor(source, VALUES)), source  # type: ignore[return-value]


def test_ops_read_the_values_and_nothing_keeps_them() -> None:
    weight, source = made()
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(nn.functional.linear(x, weight), nn.functional.linear(x, VALUES))
        assert torch.equal(weight + 1, VALUES + 1)
    assert source.decoded == 2
    assert not weight.is_decoded
    assert isinstance(weight, nn.Parameter)


def test_gradients_are_those_of_the_values() -> None:
    weight, _ = made()
    plain, x = nn.Parameter(VALUES.clone()), torch.randn(2, 4)
    for each in (weight, plain):
        nn.functional.linear(x, each).square().sum().backward()
    assert torch.equal(weight.grad, plain.grad)
    torch.optim.SGD([weight, plain], 0.1).step()
    assert weight.is_decoded
    assert torch.equal(weight.detach() + 0, plain.detach())


WRITES: dict[str, Callable[[Tensor], object]] = {
    "an op in place": lambda weight: weight.mul_(2),
    "an item": lambda weight: weight.__setitem__((0, 0), 5.0),
    "an item of an alias": lambda weight: weight.data.__setitem__((0, 0), 5.0),
    "a row": lambda weight: weight[1].zero_(),
    "a view": lambda weight: weight.view(-1)[3:5].fill_(7.0),
    "a transposed view": lambda weight: weight.T[0].fill_(7.0),
    "numpy": lambda weight: weight.detach().numpy().fill(3.0),
    "a copy into it": lambda weight: weight.copy_(torch.ones(3, 4)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_written_stays(write: Callable[[Tensor], object]) -> None:
    weight, _ = made()
    plain = nn.Parameter(VALUES.clone())
    with torch.no_grad():
        write(weight)
        write(plain)
        assert torch.equal(weight + 0, plain)
    assert not torch.equal(plain, VALUES)


def test_copies_share_the_stored_form_until_they_are_written_to() -> None:
    weight, source = made()
    copied = copy.deepcopy(weight)
    assert source.decoded == 0
    assert isinstance(copied, nn.Parameter)
    with torch.no_grad():
        copied.add_(1)
        assert torch.equal(copied + 0, VALUES + 1)
        assert torch.equal(weight + 0, VALUES)
    again = copy.deepcopy(copied)
    with torch.no_grad():
        again.zero_()
        assert torch.equal(copied + 0, VALUES + 1)


def test_it_is_saved_as_a_plain_parameter() -> None:
    layer = nn.Linear(4, 3)
    layer.weight, _ = made()
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    assert type(state["weight"]) is Tensor
    assert torch.equal(state["weight"], VALUES)


def test_a_module_moves_and_converts_with_it() -> None:
    layer = nn.Linear(4, 3)
    layer.weight, source = made()
    x = torch.randn(2, 4)
    layer.to("cpu")
    assert source.decoded == 0
    layer.double()
    assert layer.weight.dtype is torch.float64
    expected = nn.functional.linear(x.double(), VALUES.double(), layer.bias)
    assert torch.equal(layer(x.double()), expected)


def test_other_values_in_its_place_leave_it_the_same_object() -> None:
    weight, source = made()
    kept = weight
    settle(weight, torch.ones(3, 4))
    assert weight is kept
    assert type(weight) is nn.Parameter
    assert torch.equal(weight, torch.ones(3, 4))
    other, _ = made()
    before = other.data
    other.data = torch.zeros(3, 4)
    assert torch.equal(other + 0, torch.zeros(3, 4))
    other.data = before
    assert torch.equal(other + 0, VALUES)
    assert source.decoded == 0


def test_the_settled_one_is_plain() -> None:
    weight, _ = made()
    plain = settled(weight.requires_grad_(False))
    assert type(plain) is nn.Parameter
    assert not plain.requires_grad
    assert torch.equal(plain, VALUES)
    assert settled(VALUES) is VALUES
