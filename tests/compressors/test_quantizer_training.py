"""Quantizer: batch norms behind convolutions, training, schedules."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.quantized_net import ACT, Net, X, calibrated
from torch import Tensor, nn

from graphopt.errors import InputError
from graphopt.prepared import ActivationQuantizer, ConvNorm, TrainableNorm, WeightQuantizer
from graphopt.quantization import (
    ModuleQuantizerConfig,
    QATSchedule,
    QuantizationSpec,
    Quantizer,
    QuantizerConfig,
)
from graphopt.quantization.spec import PerChannelGranularity

# --- batch norms -----------------------------------------------------------------------------------
CONVS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, bias=False), (3, 4, 7, 7)),
    "conv2d groups": (lambda: nn.Conv2d(4, 8, 3, groups=2, padding="same"), (3, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), (3, 4, 5, 5, 5)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (3, 4, 9)),
    "conv_transpose2d groups": (
        lambda: nn.ConvTranspose2d(4, 8, 2, stride=2, groups=2, bias=False),
        (3, 4, 5, 5),
    ),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (3, 4, 4, 4, 4)),
}


FLOAT = QuantizerConfig(
    global_config=ModuleQuantizerConfig(
        op_state_spec=None, op_input_spec={"*": ACT}, op_output_spec=None
    )
)


def conv_norm(name: str) -> tuple[nn.Sequential, Tensor]:
    make, shape = CONVS[name]
    conv = make()
    norms = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    norm = norms[len(shape)](conv.out_channels)  # type: ignore[operator]
    nn.init.uniform_(norm.running_mean, -1, 1)
    nn.init.uniform_(norm.running_var, 0.3, 3)
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    return nn.Sequential(conv, norm), torch.randn(shape)


@pytest.mark.parametrize("name", CONVS)
def test_norm_is_folded_with_equal_outputs(name: str) -> None:
    model, x = conv_norm(name)
    model.eval()
    quantizer = Quantizer(model, FLOAT)
    prepared = quantizer.prepare((x,))
    assert sum(isinstance(module, ConvNorm) for module in prepared.modules()) == 1
    torch.testing.assert_close(prepared(x), model(x), rtol=1e-4, atol=1e-5)
    finalized = quantizer.finalize(backend="torch", on_unobserved="skip")
    torch.testing.assert_close(finalized(x), model(x), rtol=1e-4, atol=1e-5)
    assert not any("batch_norm" in str(node.target) for node in finalized.graph.nodes)


@pytest.mark.parametrize("name", CONVS)
def test_norm_runs_in_training_as_it_does_apart(name: str) -> None:
    model, x = conv_norm(name)
    quantizer = Quantizer(model, FLOAT)
    prepared = quantizer.prepare((x,))
    reference = copy.deepcopy(model).train()
    with quantizer.training_mode():
        for quantized in prepared.modules():
            if isinstance(quantized, ActivationQuantizer):
                quantized.rounding = quantized.observing = False
        got, want = prepared(x), reference(x)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        got.square().sum().backward()
        want.square().sum().backward()
    for name_, parameter in reference.named_parameters():
        mine = prepared.get_parameter(name_)
        torch.testing.assert_close(mine.grad, parameter.grad, rtol=2e-2, atol=2e-3)
    for name_ in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(prepared.get_buffer(name_), reference.get_buffer(name_))
    # the new statistics are what gets folded
    finalized = quantizer.finalize(backend="torch", on_unobserved="skip")
    torch.testing.assert_close(finalized(x), reference.eval()(x), rtol=1e-3, atol=1e-4)


def test_norm_behind_something_else_stays_and_trains() -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
    quantizer = Quantizer(model)
    prepared = quantizer.prepare((X,))
    assert sum(isinstance(module, TrainableNorm) for module in prepared.modules()) == 1
    before = prepared.get_buffer("1.running_mean").clone()
    with quantizer.training_mode():
        prepared(X)
    assert not torch.equal(before, prepared.get_buffer("1.running_mean"))


# --- training --------------------------------------------------------------------------------------
def test_dropout_is_active_in_training_only() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 8))
    quantizer = Quantizer(model)
    prepared = quantizer.prepare((torch.randn(2, 16),))
    x = torch.randn(4, 16)
    with quantizer.training_mode():
        assert not torch.equal(prepared(x), prepared(x))
    assert torch.equal(prepared(x), prepared(x))


def test_training_lowers_the_loss_and_finalizes_to_the_same() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    )
    config = QuantizerConfig.presets.w4a8()
    quantizer = Quantizer(model, config)
    x, y = torch.randn(128, 1, 8, 8), torch.randint(0, 4, (128,))
    prepared = quantizer.prepare((x,))
    quantizer.calibrate([x])
    first = float(F.cross_entropy(prepared(x), y))
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-2)
    with quantizer.training_mode():
        for _ in range(40):
            optimizer.zero_grad()
            F.cross_entropy(prepared(x), y).backward()
            optimizer.step()
            quantizer.step()
    last = float(F.cross_entropy(prepared(x), y))
    assert last < 0.5 * first
    finalized = quantizer.finalize(backend="torch")
    torch.testing.assert_close(finalized(x), prepared(x), rtol=0, atol=0)


def test_gradients_pass_straight_through_inside_the_range() -> None:
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(
            op_state_spec=None,
            op_output_spec=None,
            op_input_spec={"*": QuantizationSpec(float_range=(-1.0, 1.0))},
        )
    )
    model = nn.Linear(1, 1, bias=False)
    quantizer = Quantizer(model, config)
    prepared = quantizer.prepare((torch.randn(2, 1),))
    x = torch.tensor([[0.3], [5.0]], requires_grad=True)
    with quantizer.training_mode():
        quantizer.disable_observer()
        prepared(x).sum().backward()
    weight = float(model.weight)
    torch.testing.assert_close(x.grad, torch.tensor([[weight], [0.0]]))


def test_schedule_switches_at_its_steps() -> None:
    schedule = QATSchedule(enable_observer=1, enable_fake_quant=2, disable_observer=3)
    config = QuantizerConfig(global_config=ModuleQuantizerConfig(qat_schedule=schedule))
    quantizer = Quantizer(nn.Linear(4, 4), config)
    prepared = quantizer.prepare((torch.randn(2, 4),))
    states = []
    with quantizer.training_mode():
        for _ in range(4):
            kinds = (ActivationQuantizer, WeightQuantizer)
            found = [q for q in prepared.modules() if isinstance(q, kinds)]
            assert len({(q.observing, q.rounding) for q in found}) == 1
            states.append((found[0].observing, found[0].rounding))
            quantizer.step()
    assert states == [(False, False), (True, False), (True, True), (False, True)]


def test_module_rounds_after_training_that_ended_before_its_schedule() -> None:
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(qat_schedule=QATSchedule(enable_fake_quant=1000))
    )
    quantizer = Quantizer(nn.Linear(4, 4), config)
    x = torch.randn(8, 4)
    prepared = quantizer.prepare((x,))
    with quantizer.training_mode():
        plain = prepared(x)
        quantizer.step()
    assert not torch.equal(prepared(x), plain)
    assert torch.equal(prepared(x), quantizer.finalize(backend="torch")(x))


def test_frozen_ranges_stay_while_weights_move() -> None:
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(
            qat_schedule=QATSchedule(disable_observer=1), op_input_spec=None, op_output_spec=None
        )
    )
    quantizer = Quantizer(nn.Linear(4, 4), config)
    prepared = quantizer.prepare((torch.randn(2, 4),))
    with quantizer.training_mode():
        prepared(torch.randn(2, 4)).sum().backward()
        quantizer.step()
        (scales,) = (q.scale.clone() for q in prepared.modules() if isinstance(q, WeightQuantizer))
        with torch.no_grad():
            prepared.get_parameter("weight").mul_(3.0)
        prepared(torch.randn(2, 4)).sum().backward()
    finalized = quantizer.finalize(backend="torch")
    torch.testing.assert_close(finalized.get_buffer("weight_scale"), scales.flatten())


def test_learned_scales_move_by_gradients() -> None:
    lsq = QuantizationSpec(fake_quantize_cls="lsq")
    weight = QuantizationSpec(
        dtype="int4", fake_quantize_cls="lsq", granularity=PerChannelGranularity(axis=0)
    )
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(
            op_input_spec={"*": lsq}, op_output_spec=None, op_state_spec={"weight": weight}
        )
    )
    model = nn.Linear(16, 4)
    quantizer = Quantizer(model, config)
    x = torch.randn(64, 16)
    prepared = quantizer.prepare((x,))
    quantizer.calibrate([x])
    scales = {n: p for n, p in prepared.named_parameters() if n.endswith(".scale")}
    assert len(scales) == 2
    before = {name: parameter.detach().clone() for name, parameter in scales.items()}
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-2)
    with quantizer.training_mode():
        for _ in range(10):
            optimizer.zero_grad()
            F.mse_loss(prepared(x), model(x).detach()).backward()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scales.values())
            optimizer.step()
    assert all(not torch.equal(before[name], scales[name]) for name in scales)
    finalized = quantizer.finalize(backend="torch")
    torch.testing.assert_close(finalized(x), prepared(x), rtol=1e-5, atol=1e-5)


def test_observers_and_rounding_switch_by_module() -> None:
    # error feedback corrects biases as well, which stay corrected where nothing is rounded
    nearest = QuantizationSpec(granularity=PerChannelGranularity(), algorithm="nearest")
    module = ModuleQuantizerConfig(op_state_spec={"weight": nearest})
    quantizer = calibrated(Net().eval(), QuantizerConfig(global_config=module))
    prepared = quantizer._ready()
    rounded = prepared(X)
    quantizer.disable_fake_quant("fc")
    changed = prepared(X)
    assert not torch.equal(rounded, changed)
    quantizer.disable_fake_quant()
    torch.testing.assert_close(prepared(X), Net.forward(quantizer._model, X))  # type: ignore[arg-type]
    quantizer.enable_fake_quant()
    torch.testing.assert_close(prepared(X), rounded)
    with pytest.raises(InputError, match="no quantizer belongs to module 'nowhere'"):
        quantizer.enable_observer("nowhere")
