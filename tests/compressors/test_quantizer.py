"""Quantizer: prepare, calibrate, finalize; statistics, ranges and the order of calls."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.quantized_net import ACT, Net, X, calibrated
from torch import Tensor, nn

from graphopt.errors import CalibrationError, InputError, StateError
from graphopt.prepared import ActivationQuantizer
from graphopt.quantization import (
    ModuleQuantizerConfig,
    QuantizationScheme,
    QuantizationSpec,
    Quantizer,
    QuantizerConfig,
)


def test_prepared_and_finalized_compute_the_same() -> None:
    model = Net().eval()
    quantizer = calibrated(model)
    prepared = quantizer._ready()
    neutral = quantizer.finalize(backend="torch")
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(neutral(x), prepared(x), rtol=0, atol=0)
    error = (neutral(x) - model(x)).abs().max() / model(x).abs().max()
    assert 0 < error < 0.2


def test_names_and_model_stay_as_they_are() -> None:
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    quantizer = calibrated(model)
    prepared = quantizer._ready()
    with quantizer.training_mode():
        F.mse_loss(prepared(X), torch.zeros(2, 4)).backward()
        torch.optim.SGD(prepared.parameters(), 0.1).step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert set(before) - {"norm.num_batches_tracked", "norm2.num_batches_tracked"} <= set(
        prepared.state_dict()
    )


def test_default_rounds_inputs_weights_and_what_layers_read() -> None:
    table = calibrated(Net().eval()).summary()
    assert {row.name for row in table.quantized} == {"conv.weight", "conv2.weight", "fc.weight"}
    assert all("8 scales" in row.detail or "4 scales" in row.detail for row in table.quantized)
    scales = {record.name: record for record in table.activations if record.status == "quantized"}
    assert len(scales) == 5  # x, relu, conv2, add-relu with its pool, mean
    assert scales["x"].detail == "int8 symmetric"
    assert scales["relu"].detail == "int8 asymmetric"  # bounded below: all levels are used
    assert "max_pool2d" in scales["relu_1"].nodes
    assert "3 of 3 tensors quantized, 5 activation scales" in str(table)


def test_statistics_start_empty_and_not_from_the_example() -> None:
    """The example gives shapes only: with one 100 times too small the range is still the data's."""
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    quantizer = Quantizer(model)
    quantizer.prepare((torch.full((2, 4), 0.01),))
    data = [torch.randn(64, 4) for _ in range(20)]
    quantizer.calibrate(data)
    (entry,) = [r for r in quantizer.summary().activations if r.name == "input_1" or r.name == "x"]
    # it follows the data's own maxima, from which it may fall by a hundredth per tensor
    largest = float(torch.stack(data).max())
    assert 0.8 * largest < entry.high <= largest
    quantizer.calibrate([torch.ones(2, 4)])
    (entry,) = [r for r in quantizer.summary().activations if r.name == entry.name]
    assert entry.high == pytest.approx(1.0, rel=1e-5)
    assert entry.seen == 1


def test_calibration_takes_tensors_tuples_dicts_and_other_shapes() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.conv(a + b)

    def times_seen(quantizer: Quantizer) -> set[int]:
        return {r.seen for r in quantizer.summary().activations if r.status == "quantized"}

    quantizer = Quantizer(Two())
    quantizer.prepare((torch.randn(1, 4, 4), torch.randn(1, 4, 4)))
    wide = torch.randn(3, 4, 8)
    quantizer.calibrate([(wide, wide), {"a": wide, "b": wide}])
    assert times_seen(quantizer) == {2}
    one = Quantizer(nn.Conv2d(3, 4, 3))
    one.prepare(X)
    one.calibrate(torch.randn(1, 3, size, size) for size in (8, 12, 20))
    assert times_seen(one) == {3}


def test_calibration_is_in_evaluation_without_autograd() -> None:
    quantizer = Quantizer(Net().train())
    quantizer.prepare((X,))
    with quantizer.calibration_mode() as prepared:
        assert not prepared.training
        assert not prepared(X).requires_grad
        before = prepared(X)
        assert torch.equal(before, prepared(X))  # dropout is off, nothing is rounded yet
    assert not torch.equal(before, prepared(X))


def test_interrupted_calibration_leaves_a_usable_module() -> None:
    quantizer = Quantizer(Net().eval())
    prepared = quantizer.prepare((X,))

    def data() -> object:
        yield X
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantizer.calibrate(data())  # type: ignore[arg-type]
    assert prepared(X).shape == (2, 4)
    assert not any(q.observing for q in prepared.modules() if isinstance(q, ActivationQuantizer))


ROUNDED_RESULTS = QuantizerConfig(
    global_config=ModuleQuantizerConfig(module_output_spec={"*": ACT})
)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.rare = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.used(x), self.rare(y)


def test_finalize_names_what_was_never_observed() -> None:
    quantizer = Quantizer(Branches().eval(), ROUNDED_RESULTS)
    quantizer.prepare((torch.randn(2, 4), torch.randn(2, 4)))
    with pytest.raises(CalibrationError, match="linear_1 \\(module 'rare'\\) was never observed"):
        quantizer.finalize(backend="torch")
    skipped = quantizer.finalize(backend="torch", on_unobserved="skip")
    assert not any("quantize_per_tensor" in str(node.target) for node in skipped.graph.nodes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_finalize_names_what_saw_nan_or_inf(bad: float) -> None:
    quantizer = Quantizer(Branches().eval(), ROUNDED_RESULTS)
    prepared = quantizer.prepare((torch.randn(2, 4), torch.randn(2, 4)))
    prepared.rare.bias.data[0] = bad
    quantizer.calibrate([(torch.randn(2, 4), torch.randn(2, 4))])
    with pytest.raises(CalibrationError, match="'rare'.* saw NaN or Inf") as caught:
        quantizer.finalize(backend="torch")
    assert "'used'" not in str(caught.value)


def test_empty_range_is_an_error() -> None:
    spec = QuantizationSpec(float_range=(5.0, None), qscheme=QuantizationScheme.ASYMMETRIC)
    config = QuantizerConfig(global_config=ModuleQuantizerConfig(op_input_spec={"*": spec}))
    quantizer = calibrated(nn.Linear(4, 4), config, (torch.randn(2, 4),))
    with pytest.raises(CalibrationError, match="empty range"):
        quantizer.finalize(backend="torch")


def test_fixed_range_needs_no_data() -> None:
    spec = QuantizationSpec(float_range=(-1.0, 1.0))
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(
            op_input_spec={"*": spec}, module_output_spec={"*": spec}
        )
    )
    quantizer = Quantizer(nn.Linear(4, 4), config)
    quantizer.prepare((torch.randn(2, 4),))
    finalized = quantizer.finalize(backend="torch")
    assert (finalized(100 * torch.ones(2, 4)).abs() <= 128 / 127).all()


def test_wrong_order_of_calls_is_an_error() -> None:
    quantizer = Quantizer(Net())
    for call in (quantizer.finalize, quantizer.step, quantizer.summary):
        with pytest.raises(StateError, match="prepare"):
            call()
    quantizer.prepare((X,))
    with pytest.raises(StateError, match="called before"):
        quantizer.prepare((X,))
    with pytest.raises(InputError, match="model must be"):
        Quantizer("net.pt2")  # type: ignore[arg-type]


def test_dynamic_scales_follow_each_tensor_before_and_after_conversion() -> None:
    spec = QuantizationSpec(qparam_calculator_cls="dynamic")
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_input_spec={"*": spec}, op_output_spec=None)
    )
    model = nn.Linear(4, 4)
    quantizer = Quantizer(model, config)
    prepared = quantizer.prepare((torch.randn(2, 4),))
    for size in (1e-3, 1e3):
        x = size * torch.randn(2, 4)
        assert (prepared(x) - model(x)).abs().max() < 0.03 * size
    finalized = quantizer.finalize()
    for size in (1e-3, 1e3):
        x = size * torch.randn(2, 4)
        torch.testing.assert_close(finalized(x), prepared(x), rtol=1e-5, atol=0)
