"""A walk over the graph computes what the module computes, and lets changed weights count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import graphopt
from graphopt.errors import InputError
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import Editor
from graphopt.run.batches import Batch, as_batch, flat_inputs
from graphopt.run.layerwise import LayerwiseRun


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.stem(x)))
        y = self.act(self.conv(y)) + y
        return self.head(y.mean((2, 3)))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, pair: tuple[Tensor, Tensor], *, options: dict[str, Tensor], scale: Tensor
    ) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        y = self.fc(x + pair[0]) * options["gain"] - pair[1]
        return {"y": y * scale, "parts": (options["shift"], y.amax(1))}


class Split(nn.Module):
    """Outputs of an op with several, a tied weight, constants computed from weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.lstm = nn.LSTM(4, 3, batch_first=True)
        self.table = nn.Parameter(torch.randn(4, 3))
        self.register_buffer("mask", torch.ones(3, 3).tril())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        hidden, (state, _) = self.lstm(x)
        low, high = (self.table * 2).T.split([1, 2])
        y = (hidden @ self.mask) @ torch.cat([high, low])
        return (y + state[-1].mean()) @ self.embed.weight.T


def residual(batch: int) -> Batch:
    return (torch.randn(batch, 3, 6, 6),), {}


def nested(batch: int) -> Batch:
    args = (torch.randn(batch, 4), (torch.randn(batch, 4), torch.randn(batch, 4)))
    options = {"gain": torch.randn(4), "shift": torch.randn(batch)}
    return args, {"options": options, "scale": torch.randn(batch, 1)}


def tokens(batch: int) -> Batch:
    return (torch.randint(0, 9, (batch, 5)),), {}


MODELS: dict[str, tuple[type[nn.Module], Callable[[int], Batch]]] = {
    "residual": (Residual, residual),
    "keywords and nesting": (Nested, nested),
    "several outputs": (Split, tokens),
}


def captured(name: str) -> tuple[nn.Module, CapturedModule, list[Batch]]:
    kind, example = MODELS[name]
    model = kind().eval()
    args, kwargs = example(2)
    gm = graphopt.capture(model, args, kwargs).copy().graph_module
    return model, gm, [example(size) for size in (2, 3, 2)]


def walk(run: LayerwiseRun, nodes: list[fx.Node] | None = None) -> None:
    for node in run.gm.graph.nodes if nodes is None else nodes:
        run.step(node)


def output_node(gm: CapturedModule) -> fx.Node:
    (node,) = gm.graph.find_nodes(op="output")
    return node


@torch.no_grad()
def assert_same_outputs(run: LayerwiseRun, model: nn.Module, batches: list[Batch]) -> None:
    found = run.values(output_node(run.gm))
    assert len(found) == len(batches)
    for (args, kwargs), values in zip(batches, found, strict=True):
        expected = pytree.tree_leaves(model(*args, **kwargs))
        got = pytree.tree_leaves(values)
        assert len(got) == len(expected)
        for left, right in zip(got, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.integration
@pytest.mark.parametrize("name", MODELS)
def test_steps_through_all_nodes_compute_the_module(name: str) -> None:
    model, gm, batches = captured(name)
    run = LayerwiseRun(gm, batches)
    walk(run)
    assert_same_outputs(run, model, batches)


@pytest.mark.parametrize("name", MODELS)
def test_values_live_until_their_last_reader_has_run(name: str) -> None:
    _, gm, batches = captured(name)
    run = LayerwiseRun(gm, batches)
    order = list(gm.graph.nodes)
    for number, node in enumerate(order):
        run.step(node)
        rest = set(order[number + 1 :])
        needed = {
            each for each in order[: number + 1] if rest & set(each.users) and each in run._values
        }
        placeholders = {each for each in rest if each.op == "placeholder"}
        unread = {each for each in run._values if not each.users}
        assert set(run._values) == needed | placeholders | unread
    assert set(run._values) == {output_node(gm)}


@pytest.mark.integration
def test_a_value_with_readers_left_can_be_read_and_one_without_cannot() -> None:
    model, gm, batches = captured("residual")
    run = LayerwiseRun(gm, batches)
    conv = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.conv2d.default)
    run.step(conv)  # the first op: it reads the input and constants only
    assert isinstance(model, Residual)
    for (args, _), value in zip(batches, run.values(conv), strict=True):
        torch.testing.assert_close(value, model.stem(*args), rtol=1e-5, atol=1e-6)
    walk(run, [node for node in gm.graph.nodes if node is not conv])
    with pytest.raises(KeyError):
        run.values(conv)


def replace(gm: CapturedModule, path: str, value: Tensor) -> None:
    node = next(each for each in gm.graph.find_nodes(op="get_attr") if str(each.target) == path)
    Editor(gm).set_value(node, value)


def test_a_weight_replaced_before_its_op_counts_for_what_follows() -> None:
    model, gm, batches = captured("residual")
    run = LayerwiseRun(gm, batches)
    changed = torch.randn(4, 4, 3, 3)
    first, second = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    for node in gm.graph.nodes:
        if node is second:
            replace(gm, "conv.weight", changed)
            replace(gm, "stem.weight", torch.zeros(4, 3, 3, 3))  # too late to count
        run.step(node)
    assert first.args[1].target == "stem.weight"
    assert isinstance(model, Residual)
    with torch.no_grad():
        model.conv.weight.copy_(changed)
    assert_same_outputs(run, model, batches)


def test_what_is_computed_from_a_replaced_weight_is_computed_anew() -> None:
    model, gm, batches = captured("several outputs")
    run = LayerwiseRun(gm, batches)
    assert isinstance(model, Split)
    derived = [node for node in gm.graph.nodes if "split" in str(node.target)]
    assert derived
    assert all(run.is_constant(node) for node in derived)
    changed = torch.randn(4, 3)
    readers = [node for node in gm.graph.nodes if not run.is_constant(node)]
    last = next(node for node in reversed(readers) if node.target is torch.ops.aten.matmul.default)
    for node in gm.graph.nodes:
        if node.target is torch.ops.aten.matmul.default and node is not last:
            replace(gm, "table", changed)
        run.step(node)
    with torch.no_grad():
        model.table.copy_(changed)
    assert_same_outputs(run, model, batches)


def test_constants_need_no_step() -> None:
    model, gm, batches = captured("several outputs")
    run = LayerwiseRun(gm, batches)
    walk(run, [node for node in gm.graph.nodes if not run.is_constant(node)])
    assert_same_outputs(run, model, batches)
    (mask,) = (node for node in gm.graph.find_nodes(op="get_attr") if node.target == "mask")
    assert run.has_run(mask)
    assert [torch.equal(value, torch.ones(3, 3).tril()) for value in run.values(mask)] == [True] * 3


def test_other_values_given_to_a_node_reach_its_readers() -> None:
    model, gm, batches = captured("residual")
    run = LayerwiseRun(gm, batches)
    first, _ = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    for node in gm.graph.nodes:
        run.step(node)
        if node is first:
            run.set_values(node, [value + 1 for value in run.values(node)])
    assert isinstance(model, Residual)
    with torch.no_grad():
        assert model.stem.bias is not None
        model.stem.bias.add_(1)
    assert_same_outputs(run, model, batches)


def test_a_node_may_run_twice_when_its_inputs_are_kept() -> None:
    model, gm, batches = captured("residual")
    run = LayerwiseRun(gm, batches)
    _, second = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    for node in gm.graph.nodes:
        if node is second:
            run.step(node, keep_inputs=True)
            replace(gm, "conv.weight", torch.zeros(4, 4, 3, 3))
        run.step(node)
    assert isinstance(model, Residual)
    with torch.no_grad():
        model.conv.weight.zero_()
    assert_same_outputs(run, model, batches)
    assert set(run._values) == {output_node(gm)}


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        return self.fc(x)


def test_a_model_that_writes_into_its_input_leaves_the_batches_as_they_are() -> None:
    gm = graphopt.capture(Writes(), (torch.randn(2, 4),)).graph_module
    batches: list[Batch] = [((torch.randn(3, 4),), {})]
    before = batches[0][0][0].clone()
    walk(LayerwiseRun(gm, batches))
    assert torch.equal(batches[0][0][0], before)


WRONG: dict[str, tuple[str, Batch]] = {
    "too few": ("residual", ((), {})),
    "too many": ("residual", ((torch.zeros(1, 3, 6, 6), torch.zeros(1)), {})),
    "unknown keyword": ("residual", ((torch.zeros(1, 3, 6, 6),), {"y": torch.zeros(1)})),
    "a list instead of a tensor": ("residual", (([torch.zeros(1, 3, 6, 6)],), {})),
    "missing keywords": ("keywords and nesting", (nested(2)[0], {})),
    "missing member": (
        "keywords and nesting",
        (nested(2)[0], {**nested(2)[1], "options": {"gain": torch.zeros(4)}}),
    ),
    "longer tuple": (
        "keywords and nesting",
        ((torch.zeros(2, 4), (torch.zeros(2, 4),) * 3), nested(2)[1]),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_inputs_of_another_structure_are_refused(name: str) -> None:
    model, batch = WRONG[name]
    _, gm, _ = captured(model)
    with pytest.raises(InputError, match="do not fit the captured call"):
        flat_inputs(gm, batch)
    with pytest.raises(InputError, match="do not fit the captured call"):
        LayerwiseRun(gm, [batch])


def test_an_input_may_be_given_by_name_as_to_the_module() -> None:
    model, gm, batches = captured("residual")
    (x,) = batches[0][0]
    by_name: list[Batch] = [as_batch({"x": x})]
    torch.testing.assert_close(gm(x=x), gm(x), rtol=0, atol=0)
    run = LayerwiseRun(gm, by_name)
    walk(run)
    assert_same_outputs(run, model, by_name)


def test_inputs_of_a_call_come_as_tensor_tuple_list_or_dict() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert as_batch(x) == ((x,), {})
    assert as_batch((x, y)) == ((x, y), {})
    assert as_batch([x, y]) == ((x, y), {})
    assert as_batch({"a": x}) == ((), {"a": x})


def test_keyword_inputs_are_placed_in_the_order_of_the_graph() -> None:
    model, gm, batches = captured("keywords and nesting")
    args, kwargs = batches[0]
    turned = dict(reversed(kwargs.items()))
    found = flat_inputs(gm, (args, turned))
    expected = flat_inputs(gm, (args, kwargs))
    assert all(left is right for left, right in zip(found, expected, strict=True))
    run = LayerwiseRun(gm, [(args, turned)])
    walk(run)
    assert_same_outputs(run, model, [batches[0]])
