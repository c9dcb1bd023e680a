from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiers import some
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphopt
from graphopt.errors import InputError
from graphopt.ir.guards import by_signature, input_places


class Net(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.function = function


class Positional(Net):
    def forward(self, *args: Any) -> Tensor:
        return self.function(self, *args)


class Plain(Net):
    def forward(self, x: Any, y: Any = None) -> Tensor:
        return self.function(self, x, y)


class Keywords(Net):
    def forward(self, x: Tensor, **others: Tensor) -> Tensor:
        return self.function(self, x, others["scale"])


def attended(net: Net, x: Tensor, y: Tensor | None = None) -> Tensor:
    given: Tensor = net.attention(x, x, x, need_weights=False)[0]
    return given if y is None else given * y


def nested(net: Net, x: Any, y: Any = None) -> Tensor:
    first, second = pytree.tree_leaves(x)
    return attended(net, first) + net.linear(second)


def x_of(batch: int, length: int = 5) -> Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(batch))


CASES: dict[str, tuple[Any, Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "*args": (Positional(attended), lambda n: ((x_of(n),), {})),
    "keyword": (Plain(attended), lambda n: ((x_of(n),), {"y": x_of(n)})),
    "**others": (Keywords(attended), lambda n: ((x_of(n),), {"scale": x_of(n)})),
    "dict": (Plain(nested), lambda n: (({"a": x_of(n), "b": x_of(n)},), {})),
    "list": (Plain(nested), lambda n: (([x_of(n), x_of(n)],), {})),
    "tuple in dict": (Plain(nested), lambda n: (({"a": (x_of(n), x_of(n))},), {})),
    "dict by keyword": (Plain(nested), lambda n: ((), {"x": {"a": x_of(n), "b": x_of(n)}})),
    "size 1 broadcasts": (Plain(attended), lambda n: ((x_of(n), torch.ones(n, 1, 1)), {})),
    "batch of 1 broadcasts": (Plain(attended), lambda n: ((x_of(n), torch.ones(1, 5, 8)), {})),
}


# torch.export captures these with fixed sizes
FEW = ("*args", "dict")
FIXED = {"**others", "size 1 broadcasts", "batch of 1 broadcasts"}


@pytest.mark.integration
@pytest.mark.parametrize(
    "name",
    some(CASES, lambda name: name in FEW),
)
def test_saved_program_takes_its_example_and_other_batches(name: str, tmp_path: Path) -> None:
    model, inputs = CASES[name]
    args, kwargs = inputs(1)
    program = graphopt.capture(model.eval(), args, kwargs)
    path = tmp_path / "net.pt2"
    graphopt.lower(program, "torch").save(path)
    loaded = torch.export.load(path).module()
    for batch in (1,) if name in FIXED else (1, 3):
        given, named = inputs(batch)
        torch.testing.assert_close(loaded(*given, **named), model(*given, **named))


def test_size_of_1_that_broadcasts_stays_what_it_is(tmp_path: Path) -> None:
    model = Plain(lambda net, x, y: net.linear(x) * y).eval()
    x, y = torch.randn(3, 8), torch.randn(3, 1)
    path = tmp_path / "net.pt2"
    graphopt.lower(graphopt.capture(model, (x, y)), "torch").save(path)
    torch.testing.assert_close(torch.export.load(path).module()(x, y), model(x, y))


@pytest.mark.integration
def test_open_sizes_of_a_graph_that_fixes_one_stay_guarded(tmp_path: Path) -> None:
    program = graphopt.capture(Plain(attended).eval(), (x_of(1),))
    path = tmp_path / "net.pt2"
    graphopt.lower(program, "torch").save(path)
    with pytest.raises(AssertionError, match="Guard failed"):
        torch.export.load(path).module()(torch.randn(2, 5, 7))
    with pytest.raises(InputError, match="do not fit"):
        program.module()(torch.randn(2, 5, 7))


def test_conditions_speak_of_the_places_of_the_signature() -> None:
    class Captured(nn.Module):
        def forward(self, xs_0: Any, d: Any, scale: Any) -> None:
            return None

    places = input_places(Captured(), (1, {"a": [2, 3]}), {"scale": 4})
    assert list(places) == ["L['xs_0']", "L['d']['a'][0]", "L['d']['a'][1]", "L['scale']"]
    told = [
        "L['xs'][0].size()[0] == L['d']['a'][1].size()[0]",
        "L['flat_args'][2].size()[1] == 3",
        "L['kwargs']['scale'].size()[0] > 2",
        "L['d_a_0'].size()[1] == 3",
        "L['xs_0'].size()[0] == 2",
        "L['xs'][0].size()[0] == 2",
    ]
    assert by_signature(told, places) == [
        "L['xs_0'].size()[0] == L['d']['a'][1].size()[0]",
        "L['d']['a'][1].size()[1] == 3",
        "L['scale'].size()[0] > 2",
        "L['xs_0'].size()[0] == 2",
    ]


def test_conditions_that_a_size_of_1_breaks_are_the_tracers() -> None:
    class Captured(nn.Module):
        def forward(self, x: Any) -> None:
            return None

    height, width = "L['x'].size()[2]", "L['x'].size()[3]"
    told = [
        f"{height} * {width} != 1",
        f"(32*{height}) != 32",
        f"(1 + (-1 + {height}) // 2) * (1 + (-1 + {width}) // 2) != 1",
        f"{height} % ({width} - 1) != 1",
        f"{height} != 5",
        f"{height} != {width} + 1",
        f"{height} * {width} <= 4096",
    ]
    assert by_signature(told, input_places(Captured(), (1,), {})) == told[3:]


def test_saved_programs_run_at_the_smallest_of_their_open_sizes(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1)
    )
    artifact = graphopt.lower(
        graphopt.capture(model.eval(), (torch.randn(2, 3, 9, 7),)), "torch", shapes="open"
    )
    loaded = torch.export.load(artifact.save(tmp_path / "m.pt2")).module()
    assert artifact.verification.calls > 1
    for shape in ((1, 3, 1, 1), (2, 3, 2, 1), (3, 3, 20, 5)):
        x = torch.randn(shape)
        torch.testing.assert_close(loaded(x), model(x))
