"""Ranges of channels move into norms and weights: exactly, and so that rounding costs less."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.analysis.migrations import find_migrations
from graphopt.ir.captured_module import CapturedModule
from graphopt.passes import AnnotateQuantization, MigrateScales
from graphopt.quantization import QuantizerConfig

aten = torch.ops.aten
C = 8
OUTLIERS = torch.tensor([1.0, 30.0, 1.0, 1.0, 0.03, 1.0, 12.0, 1.0])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class WrittenNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(OUTLIERS.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Net(nn.Module):
    """Layers around which a function of a test runs."""

    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.a, self.b, self.c = nn.Linear(C, C), nn.Linear(C, C, bias=False), nn.Linear(C, C)
        self.norm, self.group, self.rms = nn.LayerNorm(C), nn.GroupNorm(2, C), WrittenNorm()
        self.batch = nn.BatchNorm2d(C)
        self.conv, self.out = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(C, 4, 3, padding=1)
        self.deep = nn.Conv2d(C, C, 3, padding=1, groups=C)
        with torch.no_grad():
            self.norm.weight.mul_(OUTLIERS)
            self.norm.bias.copy_(5.0 * noise(C, seed=3))
            self.group.weight.mul_(OUTLIERS)
            self.a.weight.mul_(OUTLIERS[:, None])
            self.a.bias.copy_(OUTLIERS)
            self.conv.weight.mul_(OUTLIERS.reshape(-1, 1, 1, 1))
            self.deep.weight.mul_(OUTLIERS.flip(0).reshape(-1, 1, 1, 1))
            # every channel counts about as much where it is read
            for layer in (self.b, self.c):
                layer.weight.div_(OUTLIERS)
            self.out.weight.div_(OUTLIERS.reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _attention(m: Net, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.c(torch.softmax(m.b(y) @ x.transpose(1, 2), -1) @ x) + y


ROWS, IMAGES = noise(32, 5, C, seed=1), noise(32, 3, 6, 6, seed=2)
FORMS: dict[str, tuple[Callable[[Net, Tensor], Tensor], Tensor]] = {
    "layer norm": (lambda m, x: m.c(m.norm(x)), ROWS),
    "one norm, two readers and a sum": (_attention, ROWS),
    "norm behind a view and a dropout": (
        lambda m, x: m.c(F.dropout(m.norm(x), 0.1, training=False).reshape(-1, C)),
        ROWS,
    ),
    "written RMS norm": (lambda m, x: m.c(m.rms(x)), ROWS),
    "GELU": (lambda m, x: m.c(F.gelu(m.a(x))), ROWS),
    "gated product": (lambda m, x: m.c(F.silu(m.b(x)) * m.a(x)), ROWS),
    "linear, ReLU, linear": (lambda m, x: m.b(F.relu(m.a(x))), ROWS),
    "group norm": (lambda m, x: m.out(m.group(m.conv(x))), IMAGES),
    "convolutions": (lambda m, x: m.out(F.relu(m.conv(x))), IMAGES),
    "depthwise": (lambda m, x: m.out(F.relu(m.deep(F.relu(m.conv(x))))), IMAGES),
    "batch norm": (lambda m, x: m.out(F.relu(m.batch(m.conv(x)))), IMAGES),
    "mean over tokens": (lambda m, x: m.b(F.relu(m.a(x)).mean(1)), ROWS),
    "mean over the batch": (lambda m, x: m.b(F.relu(m.a(x)).mean(0)), ROWS),
    "pools": (lambda m, x: m.c(F.max_pool2d(F.relu(m.conv(x)), 2).mean((2, 3))), IMAGES),
}


def annotated(function: Callable[[Net, Tensor], Tensor], data: Tensor) -> CapturedModule:
    program = graphopt.capture(Net(function).eval(), (data[:2],))
    AnnotateQuantization(QuantizerConfig.presets.w8a8_affine())(program.graph_module)
    return program.graph_module


def psnr(got: Tensor, want: Tensor) -> float:
    return 10 * math.log10(float(want.abs().max()) ** 2 / float((got - want).square().mean()))


@pytest.mark.parametrize("name", FORMS)
def test_graph_computes_the_same_with_other_ranges(name: str) -> None:
    function, data = FORMS[name]
    gm = annotated(function, data)
    want, before = gm(data).detach(), copy.deepcopy(gm.state_dict())
    result = MigrateScales([data[:16], data[16:]])(gm)
    assert result.modified
    torch.testing.assert_close(
        gm(data).detach(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max())
    )
    after = gm.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before if key in after)


@pytest.mark.parametrize("name", ["layer norm", "GELU", "convolutions", "linear, ReLU, linear"])
def test_rounding_costs_less_on_other_data(name: str) -> None:
    function, data = FORMS[name]
    model, config = Net(function).eval(), QuantizerConfig.presets.w8a8_affine()
    fresh = noise(*data.shape, seed=9)
    found = []
    for migrate in (False, True):
        config.migrate_scales = migrate
        program = graphopt.compress(model, (data[:2],), config, [data[:16], data[16:]])
        found.append(psnr(program.module()(fresh), model(fresh)))
    assert found[1] > found[0] + 3.0


def test_value_that_something_else_reads_is_given_back() -> None:
    gm = annotated(_attention, ROWS)
    MigrateScales([ROWS])(gm)
    (norm,) = gm.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    assert {str(user.target) for user in norm.users} == {"aten.linear.default", "aten.mul.Tensor"}


def test_product_takes_one_multiplication_by_a_constant() -> None:
    gm = annotated(FORMS["GELU"][0], ROWS)
    before = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
    MigrateScales([ROWS])(gm)
    after = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
    assert sorted(after) == sorted([*before, "aten.mul.Tensor"])


@pytest.mark.parametrize("name", ["linear, ReLU, linear", "depthwise", "batch norm"])
def test_scales_between_two_weights_take_no_op(name: str) -> None:
    function, data = FORMS[name]
    gm = annotated(function, data)
    before = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
    MigrateScales([data])(gm)
    assert [str(n.target) for n in gm.graph.nodes if n.op == "call_function"] == before


@pytest.mark.parametrize("data", [None, [ROWS[:1]]], ids=["no data", "one sample"])
def test_one_sample_changes_nothing(data: list[Tensor] | None) -> None:
    gm = annotated(FORMS["layer norm"][0], ROWS)
    assert not MigrateScales(data)(gm).modified


def test_few_samples_change_little() -> None:
    spreads = []
    for count in (2, 4, 16):
        gm = annotated(FORMS["written RMS norm"][0], ROWS)
        old = gm.get_parameter("rms.weight").detach().clone()
        MigrateScales([ROWS[:count]])(gm)
        new = gm.get_parameter("rms.weight").detach()
        spreads.append(float((old / new).log().std()))
    assert spreads[0] < spreads[1] < spreads[2]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.c(F.relu(m.a(x)) + 1.0),  # a sum does not commute
        lambda m, x: m.c(torch.clamp(m.a(x), 0.0, 6.0).abs()),  # nor what is unknown
        lambda m, x: F.linear(F.relu(m.a(x)), m.c.weight) + F.linear(x, m.c.weight),  # tied
        lambda m, x: m.a(x),
        lambda m, x: m.b(F.max_pool2d(F.relu(m.a(x)).mT, 3, 1, 1).mT),  # over channels, too
    ],
    ids=["sum", "unknown function", "tied weight", "nothing before", "pool over channels"],
)
def test_other_places_are_left_alone(function: Callable[[Net, Tensor], Tensor]) -> None:
    assert find_migrations(annotated(function, ROWS)) == []


def test_rescaled_network_is_as_good_as_it_was() -> None:
    """Channels of a trained net scaled by 10^±1, which a ReLU passes on, cost nothing."""
    function, data = FORMS["depthwise"]
    plain = Net(function).eval()
    with torch.no_grad():
        for layer in (plain.conv, plain.deep):
            layer.weight.copy_(0.3 * noise(*layer.weight.shape, seed=4))
    scaled = copy.deepcopy(plain)
    with torch.no_grad():
        for first, second, seed in ((scaled.conv, scaled.deep, 1), (scaled.deep, scaled.out, 2)):
            factor = 10.0 ** (2 * torch.rand(C, generator=torch.Generator().manual_seed(seed)) - 1)
            first.weight.mul_(factor.reshape(-1, 1, 1, 1))
            first.bias.mul_(factor)
            wide = factor.reshape(-1, 1, 1, 1) if second.groups > 1 else factor.reshape(1, -1, 1, 1)
            second.weight.div_(wide)
    want, found = plain(data), {}
    torch.testing.assert_close(scaled(data), want, rtol=1e-3, atol=1e-4)
    for name, model, migrate in (
        ("plain", plain, False),
        ("scaled", scaled, False),
        ("back", scaled, True),
    ):
        config = QuantizerConfig.presets.w8a8_affine()
        config.migrate_scales = migrate
        program = graphopt.compress(model, (data[:2],), config, [data[:16], data[16:]])
        found[name] = psnr(program.module()(data), want)
    assert found["scaled"] < found["plain"] - 3.0
    assert found["back"] > found["plain"] - 0.5


def test_errors_that_positions_share_count_more_where_no_bias_makes_up_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shared_error(seed: int) -> float:
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
        ).eval()
        with torch.no_grad():
            net[0].weight.mul_(torch.randn(16, 1, 1, 1).div(2).exp())
        data, x = [torch.randn(4, 3, 12, 12) for _ in range(8)], torch.randn(32, 3, 12, 12)
        config = QuantizerConfig.presets.w8a8_affine()
        state = config.global_config.op_state_spec
        state["weight"] = state["weight"].model_copy(update={"algorithm": "nearest"})
        made = graphopt.compress(net, (data[0],), config, data).module()
        with torch.no_grad():
            wanted = net(x)
            shared = (made(x) - wanted).mean((0, 2, 3))
        return float(shared.square().sum() / wanted.square().mean((0, 2, 3)).sum())

    seeds = (1, 5, 7)
    found = sum(map(shared_error, seeds))
    monkeypatch.setattr("graphopt.fitting.migration._SHARED", 1.0)
    assert found < 0.8 * sum(map(shared_error, seeds))
