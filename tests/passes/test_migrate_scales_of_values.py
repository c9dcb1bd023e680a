"""Scales of attention's values move into the output projection, head by head."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.analysis.migrations import find_migrations
from graphopt.ir.captured_module import CapturedModule
from graphopt.passes import AnnotateQuantization, MigrateScales
from graphopt.quantization import QuantizerConfig

C, HEADS, SHARED = 16, 4, 2
D = C // HEADS
FORMS = ("matmul", "fused op", "one projection", "shared heads", "shared heads in the op")


class Attention(nn.Module):
    """Attention whose value channels differ 800-fold, which the output projection makes up for."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        heads = SHARED if form.startswith("shared") else HEADS
        self.q, self.k, self.v = nn.Linear(C, C), nn.Linear(C, heads * D), nn.Linear(C, heads * D)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        factors = torch.ones(heads * D)
        factors[[1, 6, 3]] = torch.tensor([40.0, 20.0, 0.05])
        with torch.no_grad():
            self.v.weight.mul_(factors[:, None])
            self.v.bias.mul_(factors)
            self.qkv.weight[2 * C :] = F.pad(self.v.weight, (0, 0, 0, C - heads * D))
            wide = factors.reshape(heads, 1, D).expand(heads, HEADS // heads, D)
            self.out.weight.div_(wide.reshape(-1))

    def _heads(self, y: Tensor) -> Tensor:
        return y.view(y.shape[0], y.shape[1], -1, D).transpose(1, 2)

    def _operands(self, x: Tensor) -> list[Tensor]:
        if self.form == "one projection":
            joint = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, HEADS, D)
            return list(joint.permute(2, 0, 3, 1, 4).unbind(0))
        return [self._heads(each) for each in (self.q(x), self.k(x), self.v(x))]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._operands(x)
        if self.form in ("matmul", "shared heads"):
            k, v = (
                t[:, :, None].expand(-1, -1, HEADS // t.shape[1], -1, -1).flatten(1, 2)
                for t in (k, v)
            )
            y = torch.softmax(q @ k.mT / D**0.5, -1) @ v
        else:
            gqa = self.form == "shared heads in the op"
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
        return self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], C))


def noise(seed: int) -> Tensor:
    return torch.randn(32, 6, C, generator=torch.Generator().manual_seed(seed))


def annotated(model: nn.Module) -> CapturedModule:
    gm = graphopt.capture(model.eval(), (noise(0)[:2],)).graph_module
    AnnotateQuantization(QuantizerConfig.presets.w8a8_affine())(gm)
    return gm


@pytest.mark.parametrize("form", FORMS)
def test_graph_computes_the_same_with_other_values(form: str) -> None:
    gm = annotated(Attention(form))
    x = noise(1)
    want, before = gm(x).detach(), copy.deepcopy(gm.state_dict())
    ops = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
    assert MigrateScales([x])(gm).modified
    torch.testing.assert_close(gm(x).detach(), want, rtol=1e-5, atol=1e-5)
    after = gm.state_dict()
    source = "qkv" if form == "one projection" else "v"
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"{source}.weight", f"{source}.bias", "out.weight"}
    # nothing is added
    assert [str(n.target) for n in gm.graph.nodes if n.op == "call_function"] == ops
    if source == "qkv":  # queries and keys stay
        assert torch.equal(before["qkv.weight"][: 2 * C], after["qkv.weight"][: 2 * C])


def test_heads_that_share_values_share_scales() -> None:
    gm = annotated(Attention("shared heads"))
    before = gm.get_parameter("out.weight").detach().clone()
    MigrateScales([noise(1)])(gm)
    ratio = (gm.get_parameter("out.weight").detach() / before).reshape(C, SHARED, -1, D)
    assert float(ratio.std()) > 0.1
    torch.testing.assert_close(ratio, ratio[:1, :, :1].expand_as(ratio))


@pytest.mark.parametrize("form", ["matmul", "shared heads in the op"])
def test_rounding_costs_less_on_other_data(form: str) -> None:
    model, config, found = Attention(form).eval(), QuantizerConfig.presets.w8a8_affine(), []
    fresh, x = noise(9), noise(1)
    with torch.no_grad():
        want = model(fresh)
        for migrate in (False, True):
            config.migrate_scales = migrate
            program = graphopt.compress(model, (x[:2],), config, [x[:16], x[16:]])
            error = (program.module()(fresh) - want).square().mean()
            found.append(10 * math.log10(float(want.abs().max() ** 2 / error)))
    assert found[1] > found[0] + 10.0


def test_one_sample_changes_nothing() -> None:
    assert not MigrateScales([noise(1)[:1]])(annotated(Attention("matmul"))).modified


class Keys(Attention):
    """The values are the keys as well."""

    def forward(self, x: Tensor) -> Tensor:
        q, _, v = self._operands(x)
        y = F.scaled_dot_product_attention(q, v, v)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class OverChannels(Attention):
    """A product that sums over the channels of the values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._operands(x)
        y = torch.softmax(q @ v.mT, -1) @ k
        return self.out(torch.tanh(y).transpose(1, 2).reshape(x.shape))


class PartRead(Attention):
    """A half of the values' channels goes somewhere else, too."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._operands(x)
        y = torch.softmax(q @ k.mT, -1) @ v
        other = torch.tanh(v[..., :2]).sum()
        return self.out(y.transpose(1, 2).reshape(x.shape)) + other


@pytest.mark.parametrize("net", [Keys, OverChannels, PartRead])
def test_values_that_something_else_reads_stay(net: type[Attention]) -> None:
    assert find_migrations(annotated(net("matmul"))) == []
