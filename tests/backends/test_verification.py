"""Saving compares what was written: the rule, what it refuses, and which op it names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends import load_backend
from graphopt.backends.torch_export.backend import TorchArtifact
from graphopt.backends.verification import Evaluation, Verification, merged, verified
from graphopt.errors import InputError, VerificationError
from graphopt.ir.program import Program
from graphopt.quantization import QuantizerConfig


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.second(torch.sigmoid(self.first(x)))
        return y, y.argmax(-1)


def program_of(net: nn.Module, x: Tensor) -> Program:
    return graphopt.capture(net.eval(), (x,))


def judged(program: Program, x: Tensor, outputs: Any, precision: str = "float32") -> Verification:
    return verified(Evaluation(tuple(outputs), "by hand"), program, ((x,), {}), precision)


def outputs_of(program: Program, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(program.module()(x))


@pytest.mark.parametrize(
    ("relative", "precision", "holds"),
    [
        (5e-4, "float32", True),
        (2e-3, "float32", False),
        (1.9e-3, "float16", True),
        (5e-2, "float16", False),
    ],
)
def test_floats_may_differ_by_a_part_of_the_peak(
    relative: float, precision: str, holds: bool
) -> None:
    x = torch.randn(4, 8)
    program = program_of(Net(), x)
    value, place = outputs_of(program, x)
    value[1, 2] += relative * value.abs().max()
    assert judged(program, x, (value, place), precision).holds is holds


def test_sixteen_bits_may_err_as_much_as_pytorch_does_in_them() -> None:
    class Cancelling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 300) - 300

    x = torch.rand(16) * 0.1 + 0.1
    program = program_of(Cancelling(), x)
    in_half = ((x.half() + 300) - 300).float()
    assert float((in_half - x).abs().max() / x.max()) > 0.05
    assert judged(program, x, (in_half,), "float16").holds
    assert not judged(program, x, (in_half,), "float32").holds
    assert not judged(program, x, (x * 10,), "float16").holds


def added_up_in_float16(x: Tensor, weight: Tensor) -> Tensor:
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float16)
    for place in range(x.shape[1]):
        total += x[:, place : place + 1].half() * weight[:, place].half()
    return total.float()


@pytest.mark.parametrize("sign", ["both", "positive"])
@pytest.mark.parametrize("terms", [64, 1024, 4096])
def test_a_target_may_add_up_in_sixteen_bits_where_it_says_so(sign: str, terms: int) -> None:
    layer, x = nn.Linear(terms, 32, bias=False), torch.randn(4, terms)
    x = x.abs() if sign == "positive" else x
    program = program_of(layer, x)
    value = added_up_in_float16(x, layer.weight.detach())

    def outcome(value: Tensor, *families: str) -> Verification:
        evaluation = Evaluation((value,), "by hand", narrow_sums=families)
        return verified(evaluation, program, ((x,), {}), "float16")

    assert outcome(value, "linear").holds
    assert not outcome(value + 0.2 * value.abs().max(), "linear").holds
    if terms > 64:
        assert not outcome(value).holds


@pytest.mark.slow
@pytest.mark.coreai
def test_matrices_attention_and_running_sums_save_in_float16(tmp_path: Path) -> None:
    """The runtime adds up in float16; sums that only grow would stand still at 2048."""

    class Sums(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            few, more = x[:, :40], x[:, :600]
            y = torch.nn.functional.scaled_dot_product_attention(few, more, more.square())
            return y, more.mT @ more, x.abs().cumsum(1)

    program = graphopt.capture(Sums(), (torch.randn(1, 3000, 8),))
    artifact = graphopt.lower(program, "coreai", precision="float16")
    artifact.save(tmp_path / "sums.aimodel")
    assert artifact.verification is not None
    assert artifact.verification.outputs[-1] < 1e-3


def test_integers_are_equal_but_for_ties() -> None:
    x = torch.randn(4, 8)
    program = program_of(Net(), x)
    value, place = outputs_of(program, x)
    assert not judged(program, x, (value, (place + 1) % 8)).holds

    class Ties(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x).argmax(-1)

    low = -torch.rand(2, 5)
    low[1, 3] = 1.0
    ties = program_of(Ties(), low)
    assert judged(ties, low, (torch.tensor([4, 3]),)).holds  # every place of the first row is zero
    assert not judged(ties, low, (torch.tensor([0, 2]),)).holds


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_never_holds(wrong: float) -> None:
    x = torch.randn(4, 8)
    program = program_of(Net(), x)
    value, place = outputs_of(program, x)
    value[0, 0] = wrong
    assert not judged(program, x, (value, place), "float16").holds


def test_rounded_activations_may_move_by_a_few_steps() -> None:
    x = torch.randn(64, 8)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    program = graphopt.compress(
        net, (x,), QuantizerConfig.presets.w8a8(), calibration_data=[x], progress=False
    )
    with torch.no_grad():
        value = program.module()(x)
    step = (value.max() - value.min()) / 255
    assert judged(program, x, (value + 1.5 * step,)).holds
    assert not judged(program, x, (value + 20 * step,)).holds
    assert not judged(program, x, (-value,)).holds


def test_one_wrong_call_among_several_is_enough() -> None:
    good, bad = Verification(0.1, (0.1,), "x"), Verification(0.2, (0.2,), "x", holds=False)
    assert merged([good, bad, good]) == Verification(0.2, (0.2,), "x", holds=False, calls=3)
    with pytest.raises(InputError, match="no call"):
        merged([])


@pytest.fixture
def sigmoid_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files whose sigmoid is a tanh where its input is positive somewhere behind 3."""
    write: Callable[..., None] = TorchArtifact._write

    def broken(self: TorchArtifact, path: Path) -> None:
        graph = self.exported.graph_module.graph
        for node in graph.nodes:
            if node.target is torch.ops.aten.sigmoid.default:
                node.target = torch.ops.aten.tanh.default
        write(self, path)

    monkeypatch.setattr(TorchArtifact, "_write", broken)


@pytest.mark.integration
@pytest.mark.usefixtures("sigmoid_is_wrong")
def test_a_wrong_artifact_is_not_written_and_its_first_wrong_op_is_named(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    path = tmp_path / "m.pt2"
    path.write_bytes(b"what was there")
    artifact = graphopt.lower(program_of(Net(), x), "torch")
    with pytest.raises(VerificationError, match=r"aten\.sigmoid\.default .*nothing was written"):
        artifact.save(path, overwrite=True)
    assert path.read_bytes() == b"what was there"
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]
    assert artifact.path is None
    artifact.save(path, overwrite=True, verify=False)
    assert artifact.verification is None
    assert not artifact.verify().holds


class Clipped(nn.Module):
    """Its sigmoid and a tanh agree on inputs of zero alone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * x


@pytest.mark.usefixtures("sigmoid_is_wrong")
def test_calls_that_are_given_are_compared_too(tmp_path: Path) -> None:
    program = program_of(Clipped(), torch.zeros(2, 3))
    artifact = graphopt.lower(program, "torch")
    assert artifact.save(tmp_path / "example.pt2").exists()
    assert artifact.verification is not None
    assert artifact.verification.max_error == 0
    for calls in ([torch.zeros(2, 3), torch.ones(2, 3)], [{"x": torch.ones(2, 3)}]):
        with pytest.raises(VerificationError, match="sigmoid"):
            artifact.save(tmp_path / "given.pt2", verify=calls)
    assert not (tmp_path / "given.pt2").exists()


def test_a_limit_beside_the_rule_leaves_nothing_behind(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    artifact = graphopt.lower(program_of(Net(), x), "torch")
    with pytest.raises(VerificationError, match="allowed is -1"):
        artifact.save(tmp_path / "m.pt2", max_error=-1)
    assert list(tmp_path.iterdir()) == []


def test_saving_evaluates_the_artifact_once_and_lowers_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4, 8)
    artifact = graphopt.lower(program_of(Net(), x), "torch")
    backend = type(load_backend("torch"))
    evaluate, calls = backend.evaluate_sequence, []
    monkeypatch.setattr(
        backend, "evaluate_sequence", lambda *given: calls.append("evaluate") or evaluate(*given)
    )
    monkeypatch.setattr(backend, "lower", lambda *given, **options: calls.append("lower"))
    artifact.save(tmp_path / "m.pt2")
    assert calls == ["evaluate"]


class CastNorm(nn.Module):
    """A norm in float32 within a model of 16 bits, whose trace asserts the types between."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        wide = self.linear(x).float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True))).to(x.dtype) * self.scale


def test_asserted_types_do_not_stop_what_is_compared_in_wider_ones(tmp_path: Path) -> None:
    net, x = CastNorm().to(torch.bfloat16), torch.randn(4, 8, dtype=torch.bfloat16)
    artifact = graphopt.lower(program_of(net, x), "torch")
    artifact.save(tmp_path / "m.pt2")
    assert artifact.verification is not None
    assert artifact.verification.complete
    assert artifact.verification.holds
