"""The table of ops: every op with a weight is served, and a user's own op after one registration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.palettized_nets import uniform
from helpers.tiers import some
from torch import Tensor, nn

import graphopt
from graphopt.analysis.matrix_form import weight_uses
from graphopt.analysis.weights import find_weights
from graphopt.errors import InputError, LoweringError
from graphopt.ir import op_info
from graphopt.ir.op_info import BiasSlot, OpInfo, Scales, WeightSlot
from graphopt.palettization import KMeansPalettizer, KMeansPalettizerConfig, PalettizationSpec
from graphopt.passes import CorrectBias, FoldBatchNorm, RemoveUnused
from graphopt.passes.pass_manager import run_passes
from graphopt.quantization import Quantizer

aten = torch.ops.aten
_Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def general(ndim: int, *, transposed: bool) -> _Call:
    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ones, zeros = [1] * ndim, [0] * ndim
        return aten.convolution(x, w, b, ones, zeros, ones, transposed, zeros, 1)

    return call


def bias_last(op: Callable[..., Tensor]) -> _Call:
    return lambda x, w, b: op(x, w, b)


def bags(x: Tensor, w: Tensor, *padding: None) -> Tensor:
    starts = torch.arange(len(x)) * x.shape[1]
    options = (False, 0, False, None, False, *padding)
    return aten.embedding_bag(w, x.long().flatten(), starts, *options)[0]


# overload → (call with input, weight and bias, shape of the input, of the weight, of the bias)
CASES: dict[str, tuple[_Call, list[int], list[int], int]] = {
    "aten.linear.default": (bias_last(aten.linear), [3, 8], [6, 8], 6),
    "aten.addmm.default": (lambda x, w, b: aten.addmm(b, x, w), [3, 8], [8, 6], 6),
    "aten.mm.default": (lambda x, w, b: aten.mm(x, w) + b, [3, 8], [8, 6], 6),
    "aten.matmul.default": (lambda x, w, b: aten.matmul(x, w) + b, [2, 3, 8], [8, 6], 6),
    "aten.bmm.default": (lambda x, w, b: aten.bmm(x, w) + b, [2, 3, 8], [2, 8, 6], 6),
    "aten.baddbmm.default": (
        lambda x, w, b: aten.baddbmm(b[None, None], x, w),
        [2, 3, 8],
        [2, 8, 6],
        6,
    ),
    "aten.embedding_bag.padding_idx": (lambda x, w, b: bags(x, w, None) + b, [3, 4], [8, 6], 6),
    "aten.embedding_bag.default": (lambda x, w, b: bags(x, w) + b, [3, 4], [8, 6], 6),
    "aten.embedding.default": (lambda x, w, b: aten.embedding(w, x.long()) + b, [3, 4], [8, 6], 6),
}
for _n in (1, 2, 3):
    _plain, _turned = getattr(aten, f"conv{_n}d"), getattr(aten, f"conv_transpose{_n}d")
    _x, _w = [2, 4, *[5] * _n], [6, 4, *[3] * _n]
    CASES[f"aten.conv{_n}d.default"] = (bias_last(_plain.default), _x, _w, 6)
    CASES[f"aten.conv{_n}d.padding"] = (
        lambda x, w, b, op=_plain: op.padding(x, w, b, [1], "same"),
        _x,
        _w,
        6,
    )
    _name = "default" if _n == 1 else "input"
    CASES[f"aten.conv_transpose{_n}d.{_name}"] = (
        bias_last(getattr(_turned, _name)),
        _x,
        [4, 6, *_w[2:]],
        6,
    )
GENERAL = {
    f"convolution{ndim}d{' transposed' * turned}": (
        general(ndim, transposed=turned),
        [2, 4, *[5] * ndim],
        [4, 6, *[3] * ndim] if turned else [6, 4, *[3] * ndim],
        6,
    )
    for ndim in (1, 2, 3)
    for turned in (False, True)
}
EVERY = {**CASES, **GENERAL}
CONVOLUTIONS = [name for name in EVERY if "conv" in name]


class Net(nn.Module):
    """One op with a weight and a bias, and what stands behind it."""

    def __init__(self, name: str, behind: nn.Module | None = None) -> None:
        super().__init__()
        self.call, _, shape, bias = EVERY[name]
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(bias))
        self.behind = behind or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.call(x, self.weight, self.bias))


WITHOUT_MATRIX = {name for name in EVERY if any(kind in name for kind in ("bmm", "embedding_bag"))}
# of each kind one: the others are in the slow tier
SOME = set(list(EVERY)[::3])


def batch(name: str) -> Tensor:
    shape = EVERY[name][1]
    return torch.randint(0, 8, shape) if "embedding" in name else torch.randn(shape) + 1


def test_every_op_of_the_table_with_a_weight_has_a_case() -> None:
    known = {str(op) for op in op_info.targets(lambda info: info.weights)}
    assert known == {*CASES, "aten.convolution.default"}


@pytest.mark.integration
@pytest.mark.parametrize("name", some(EVERY, lambda name: name in SOME))
def test_weight_is_found_palettized_and_priced(name: str) -> None:
    net, x = Net(name).eval(), batch(name)
    program = graphopt.capture(net, (x,))
    found = {weight.name: weight for weight in find_weights(program.graph_module)}
    assert [use.role for use in found["weight"].uses] == ["weight"]
    is_matrix = bool(weight_uses(program.graph_module, [found["weight"]]))
    assert is_matrix == (name not in WITHOUT_MATRIX)
    palettizer = KMeansPalettizer(net, KMeansPalettizerConfig())
    prepared = palettizer.prepare((x,))
    (row,) = palettizer.summary().palettized
    assert row.name == "weight"
    assert row.bits_per_weight is not None
    assert 4 <= row.bits_per_weight < 32
    made = palettizer.finalize()
    torch.testing.assert_close(made(x), prepared(x), rtol=1e-5, atol=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize("name", some(EVERY, lambda name: name in SOME))
def test_weight_is_quantized(name: str) -> None:
    net, x = Net(name).eval(), batch(name)
    quantizer = Quantizer(net)
    prepared = quantizer.prepare((x,))
    with quantizer.calibration_mode():
        prepared(x)
    made = quantizer.finalize()
    rows = {row.name: row.status for row in quantizer.summary().rows}
    assert rows["weight"] == "quantized"
    exact = net(x)
    assert float((made(x) - exact).norm() / exact.norm()) < 0.05


def lowered_or_refused(name: str, target: str) -> None:
    net, x = Net(name).eval(), batch(name)
    palettizer = KMeansPalettizer(net, KMeansPalettizerConfig())
    palettizer.prepare((x,))
    made = palettizer.finalize()
    reason = ""
    try:
        graphopt.lower(made, target, x)
    except LoweringError as refusal:
        reason = str(refusal)
    assert not reason or (target != "torch" and len(reason) > 20)


@pytest.mark.parametrize("name", ["aten.linear.default", "convolution2d", "aten.bmm.default"])
def test_palettized_op_is_lowered_to_torch(name: str) -> None:
    lowered_or_refused(name, "torch")


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("target", "extra"),
    [
        ("torch", "torch"),
        pytest.param("coreai", "coreai_torch", marks=pytest.mark.coreai),
        pytest.param("coreml", "coremltools", marks=pytest.mark.coreml),
        pytest.param("executorch", "executorch", marks=pytest.mark.executorch),
    ],
)
def test_palettized_op_is_lowered_or_refused_with_a_reason(
    name: str, target: str, extra: str
) -> None:
    pytest.importorskip(extra)
    lowered_or_refused(name, target)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_batch_norm_is_folded_into_every_convolution(name: str) -> None:
    ndim = len(EVERY[name][1]) - 2
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[ndim - 1](6)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.3, 3.0)
    net, x = Net(name, norm).eval(), batch(name)
    gm = graphopt.capture(net, (x,)).copy().graph_module
    run_passes(gm, [FoldBatchNorm(), RemoveUnused()])
    assert not any("batch_norm" in str(node.target) for node in gm.graph.nodes)
    torch.testing.assert_close(gm(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize(
    "name",
    some(
        [*CONVOLUTIONS, "aten.linear.default", "aten.addmm.default"],
        lambda name: name in SOME or "linear" in name,
    ),
)
def test_bias_takes_up_the_mean_error(name: str) -> None:
    net, x = Net(name).eval(), batch(name)
    program = graphopt.capture(net, (x,))
    palettizer = KMeansPalettizer(net, uniform(PalettizationSpec(n_bits=2)))
    palettizer.prepare((x,))
    gm = palettizer.finalize()
    axis = 1 if "conv" in name else -1

    def means(value: Tensor) -> Tensor:
        return value.movedim(axis, 0).flatten(1).mean(1)

    assert not torch.allclose(means(gm(x)), means(net(x)), atol=1e-3)
    run_passes(gm, [CorrectBias([x], program.graph_module)])
    torch.testing.assert_close(means(gm(x)), means(net(x)), rtol=1e-4, atol=1e-4)


@pytest.fixture
def toy() -> Iterator[OpInfo]:
    """A user's own op, unknown to the table: half of a linear layer."""
    library = torch.library.Library("toy", "FRAGMENT")
    library.define("scaled_linear(Tensor x, Tensor w, Tensor b) -> Tensor")
    library.impl(
        "scaled_linear",
        lambda x, w, b: 0.5 * (x @ w.t()) + b,
        "CompositeExplicitAutograd",
    )
    yield OpInfo(
        names=("scaled_linear",),
        targets=(torch.ops.toy.scaled_linear.default,),
        weights=(WeightSlot(1, 0, "linear", data=0, bias=2),),
        biases=(BiasSlot(2),),
        scales=Scales.COMPUTE,
    )
    library._destroy()


class ToyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8))
        self.b = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.toy.scaled_linear(x, self.w, self.b)


def roles(net: nn.Module, x: Tensor) -> list[str]:
    gm = graphopt.capture(net, (x,)).graph_module
    return [use.role for weight in find_weights(gm) for use in weight.uses]


@pytest.mark.integration
def test_own_op_is_compressed_and_stored_after_one_registration(
    toy: OpInfo, tmp_path: Path
) -> None:
    net, x = ToyNet().eval(), torch.randn(5, 8)
    assert roles(net, x) == []
    with op_info.register(toy):
        assert sorted(roles(net, x)) == ["bias", "weight"]
        palettizer = KMeansPalettizer(net)
        palettizer.prepare((x,))
        palettized = palettizer.finalize(backend="torch")
        assert [row.name for row in palettizer.summary().palettized] == ["w"]
        path = graphopt.lower(palettized, "torch", x).save(tmp_path / "toy.pt2")
        loaded = torch.export.load(path).module()
        torch.testing.assert_close(loaded(x), palettized(x), rtol=0, atol=1e-6)
        quantizer = Quantizer(net)
        prepared = quantizer.prepare((x,))
        with quantizer.calibration_mode():
            prepared(x)
        quantized = quantizer.finalize(backend="torch")
        called = [str(node.target) for node in quantized.graph.nodes]
        assert called.count("quantized_decomposed.quantize_per_tensor.default") == 1
        exact = net(x)
        assert float((quantized(x) - exact).norm() / exact.norm()) < 0.05
    assert op_info.info_of(toy.targets[0]) is None
    assert roles(net, x) == []


def test_earlier_name_of_the_embeddings_matrix_is_taken_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="'lookup'.* is called 'embedding' now"):
        slot = WeightSlot(0, matrix="lookup")  # type: ignore[arg-type]
    assert slot == WeightSlot(0, matrix="embedding")


def test_known_op_is_replaced_only_when_asked() -> None:
    linear = aten.linear.default
    before = op_info.info_of(linear)
    other = OpInfo(("mine",), (linear,))
    with pytest.raises(InputError, match=r"aten\.linear\.default is known already"):
        op_info.register(other)
    with op_info.register(other, replace=True):
        assert op_info.info_of(linear) is other
    assert op_info.info_of(linear) is before
