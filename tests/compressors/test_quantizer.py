"""Quantizer: prepare, calibrate, train, finalize."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import CalibrationError, ConfigError, InputError, LoweringError, StateError
from graphopt.palettization import KMeansPalettizer, KMeansPalettizerConfig
from graphopt.prepared import ActivationQuantizer, ConvNorm, TrainableNorm, WeightQuantizer
from graphopt.quantization import (
    ModuleQuantizerConfig,
    OpQuantizerConfig,
    QATSchedule,
    QuantizationFormulation,
    QuantizationScheme,
    QuantizationSpec,
    Quantizer,
    QuantizerConfig,
)
from graphopt.quantization.spec import PerChannelGranularity

ACT = QuantizationSpec()
AFFINE = QuantizationSpec(qscheme=QuantizationScheme.ASYMMETRIC)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 4)
        for norm in (self.norm, self.norm2):
            nn.init.uniform_(norm.running_mean, -0.3, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        y = F.relu(y + self.norm2(self.conv2(y)))
        return self.fc(self.drop(F.max_pool2d(y, 2).mean((2, 3))))


X = torch.randn(2, 3, 8, 8)


def calibrated(
    model: nn.Module, config: QuantizerConfig | None = None, inputs: tuple[Tensor, ...] = (X,)
) -> Quantizer:
    quantizer = Quantizer(model, config)
    quantizer.prepare(inputs)
    quantizer.calibrate([inputs])
    return quantizer


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


def test_default_rounds_inputs_outputs_and_weights() -> None:
    table = calibrated(Net().eval()).summary()
    assert {row.name for row in table.quantized} == {"conv.weight", "conv2.weight", "fc.weight"}
    assert all("8 scales" in row.detail or "4 scales" in row.detail for row in table.quantized)
    scales = {record.name: record for record in table.activations if record.status == "quantized"}
    assert len(scales) == 6  # x, relu, conv2, add-relu with its pool, mean, fc
    assert scales["x"].detail == "int8 symmetric"
    assert scales["relu"].detail == "int8 asymmetric"  # bounded below: all levels are used
    assert "max_pool2d" in scales["relu_1"].nodes
    assert "3 of 3 tensors quantized, 6 activation scales" in str(table)


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
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    quantizer = Quantizer(Two())
    quantizer.prepare((torch.randn(1, 4, 4), torch.randn(1, 4, 4)))
    wide = torch.randn(3, 6, 8)
    quantizer.calibrate([(wide, wide), {"a": wide, "b": wide}])
    assert all(record.seen == 2 for record in quantizer.summary().activations)
    one = Quantizer(nn.Conv2d(3, 4, 3))
    one.prepare(X)
    one.calibrate(torch.randn(1, 3, size, size) for size in (8, 12, 20))
    assert {record.seen for record in one.summary().activations} == {3}


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


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.rare = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.used(x), self.rare(y)


def test_finalize_names_what_was_never_observed() -> None:
    quantizer = Quantizer(Branches().eval())
    quantizer.prepare((torch.randn(2, 4), torch.randn(2, 4)))
    with pytest.raises(CalibrationError, match="linear_1 \\(module 'rare'\\) was never observed"):
        quantizer.finalize(backend="torch")
    skipped = quantizer.finalize(backend="torch", on_unobserved="skip")
    assert not any("quantize_per_tensor" in str(node.target) for node in skipped.graph.nodes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_finalize_names_what_saw_nan_or_inf(bad: float) -> None:
    quantizer = Quantizer(Branches().eval())
    quantizer.prepare((torch.randn(2, 4), torch.randn(2, 4)))
    y = torch.randn(2, 4)
    y[0, 0] = bad
    quantizer.calibrate([(torch.randn(2, 4), y)])
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
        global_config=ModuleQuantizerConfig(op_input_spec={"*": spec}, op_output_spec={"*": spec})
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


def test_dynamic_scales_work_in_torch_and_are_refused_by_targets() -> None:
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
    with pytest.raises(LoweringError, match="dynamic"):
        quantizer.finalize()


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
    quantizer = calibrated(Net().eval())
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


# --- configs ---------------------------------------------------------------------------------------
def test_none_switches_off_by_type_name_and_op() -> None:
    model = Net().eval()
    off = QuantizerConfig().without("fc")
    kept = {r.name for r in calibrated(model, off).summary().activations if r.status == "quantized"}
    assert "relu" in kept
    assert "linear" not in kept
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_type_config={"conv2d": None, "add": None})
    )
    assert [row.name for row in calibrated(model, config).summary().quantized] == ["fc.weight"]
    with pytest.raises(ConfigError, match="closest: conv, conv2"):
        calibrated(model, QuantizerConfig(module_name_configs={"conv3": None}))


def test_slots_by_position_and_by_name() -> None:
    class Add(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    inputs = (torch.randn(2, 3), torch.randn(2, 3))
    for slots, wanted in (({0: ACT}, {"a"}), ({"other": ACT}, {"b"}), ({"*": ACT, 1: None}, {"a"})):
        config = QuantizerConfig(
            global_config=ModuleQuantizerConfig(op_input_spec=slots, op_output_spec=None)
        )
        records = calibrated(Add(), config, inputs).summary().activations
        assert {r.name for r in records if r.status == "quantized"} == wanted


def test_named_op_types_are_quantized_though_float_by_default() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    x = (torch.randn(4, 8),)
    plain = calibrated(model, None, x).summary().activations
    assert any("left in float unless a config names it" in r.detail for r in plain) or not any(
        r.name == "layer_norm" for r in plain
    )
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_type_config={"layer_norm": OpQuantizerConfig()})
    )
    named = calibrated(model, config, x).summary().activations
    assert any("layer_norm" in r.name and r.status == "quantized" for r in named)


def test_module_boundaries_have_specs_of_their_own() -> None:
    config = QuantizerConfig(
        global_config=None,
        module_name_configs={
            "conv2": ModuleQuantizerConfig(
                op_input_spec=None,
                op_output_spec=None,
                op_state_spec=None,
                module_input_spec={0: AFFINE},
                module_output_spec={"*": ACT},
            )
        },
    )
    records = calibrated(Net().eval(), config).summary().activations
    done = {r.name: r.detail for r in records if r.status == "quantized"}
    assert done == {"relu": "int8 asymmetric", "conv2d_1": "int8 symmetric"}


def test_the_more_specific_of_two_specs_holds_and_the_other_is_reported() -> None:
    uint8 = QuantizationSpec(dtype=torch.uint8, qscheme=QuantizationScheme.ASYMMETRIC)
    config = QuantizerConfig(
        module_name_configs={"1": ModuleQuantizerConfig(op_input_spec={"*": uint8})}
    )
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.warns(graphopt.errors.ConfigWarning, match="asks for int8 .* holds for all"):
        quantizer = calibrated(model, config, (torch.randn(2, 4),))
    table = quantizer.summary()
    (shared,) = [r for r in table.activations if r.name == "linear"]
    assert shared.detail == "uint8 asymmetric"
    assert any("asks for int8" in warning for warning in table.warnings)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (QuantizationSpec(granularity=PerChannelGranularity()), "one scale per tensor"),
        (
            QuantizationSpec(dtype="fp8_e4m3", granularity=PerChannelGranularity(axis=1)),
            "float activations",
        ),
    ],
)
def test_granularities_that_activations_cannot_have(spec: QuantizationSpec, text: str) -> None:
    config = QuantizerConfig(global_config=ModuleQuantizerConfig(op_input_spec={"*": spec}))
    with pytest.raises(ConfigError, match=text):
        Quantizer(nn.Linear(4, 4), config).prepare((torch.randn(2, 4),))


def test_key_value_caches_are_refused_by_name() -> None:
    from graphopt.quantization import KVCacheQuantConfig

    entry = KVCacheQuantConfig(op_quantizer_config=OpQuantizerConfig())
    with pytest.raises(ConfigError, match="kv_cache_quant_configs"):
        Quantizer(nn.Linear(2, 2), QuantizerConfig(kv_cache_quant_configs={"cache": entry}))


# --- forms -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dtype", "form", "scheme"),
    [
        (dtype, form, scheme)
        for dtype in ("int8", "uint8", "fp8_e4m3", "fp8_e5m2")
        for form in QuantizationFormulation
        for scheme in QuantizationScheme
        # float types have neither minimum nor zero point
        if not (dtype.startswith("fp8") and (form == "minval" or scheme == "asymmetric"))
    ],
)
def test_every_form_of_activation_converts_to_what_was_prepared(
    dtype: str, form: QuantizationFormulation, scheme: QuantizationScheme
) -> None:
    spec = QuantizationSpec(dtype=dtype, qscheme=scheme, qformulation=form)
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_input_spec={"*": spec}, op_output_spec={"*": spec})
    )
    quantizer = calibrated(Net().eval(), config)
    x = torch.randn(2, 3, 8, 8)
    got, want = quantizer.finalize(backend="torch")(x), quantizer._ready()(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_per_channel_activations_convert_to_what_was_prepared() -> None:
    spec = QuantizationSpec(granularity=PerChannelGranularity(axis=1))
    config = QuantizerConfig(
        global_config=None,
        module_name_configs={"conv": ModuleQuantizerConfig(op_input_spec={"*": spec})},
    )
    quantizer = calibrated(Net().eval(), config)
    torch.testing.assert_close(quantizer.finalize(backend="torch")(X), quantizer._ready()(X))


def test_half_precision_models_are_quantized() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(torch.bfloat16)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    quantizer = calibrated(model, None, (x,))
    finalized = quantizer.finalize(backend="torch")
    assert finalized(x).dtype == torch.bfloat16
    torch.testing.assert_close(finalized(x), quantizer._ready()(x))
    torch.testing.assert_close(finalized(x), model(x), rtol=0.1, atol=0.05)


def test_tied_weights_are_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 8)
            self.head = nn.Linear(8, 16, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    quantizer = calibrated(Tied(), None, (torch.randint(0, 16, (2, 5)),))
    (row,) = quantizer.summary().quantized
    assert {row.name, *row.aliases} == {"embed.weight", "head.weight"}
    state = quantizer.finalize(backend="torch").state_dict()
    assert sum("quantized" in name for name in state) == 1
    assert not any(name.endswith("weight") for name in state)


def test_programs_save_load_copy_and_pickle(tmp_path: object) -> None:
    quantizer = calibrated(Net().eval())
    finalized = quantizer.finalize(backend="torch")
    want = finalized(X)
    exported = torch.export.export(finalized, (X,))
    stream = io.BytesIO()
    torch.export.save(exported, stream)
    stream.seek(0)
    torch.testing.assert_close(torch.export.load(stream).module()(X), want)
    prepared = copy.deepcopy(quantizer._ready())
    torch.testing.assert_close(prepared(X), want)
    stream = io.BytesIO()
    torch.save(prepared, stream)
    stream.seek(0)
    torch.testing.assert_close(torch.load(stream, weights_only=False)(X), want)
    torch.testing.assert_close(quantizer.finalize(prepared, backend="torch")(X), want)


def test_prepared_module_exports() -> None:
    prepared = calibrated(Net().eval())._ready()
    exported = torch.export.export(prepared, (X,))
    torch.testing.assert_close(exported.module()(X), prepared(X), rtol=1e-4, atol=1e-4)


# --- beside palettization --------------------------------------------------------------------------
@pytest.mark.coreai
@pytest.mark.parametrize("through", ["coreai", "torch", "program"])
def test_palettized_model_gets_quantized_activations(through: str) -> None:
    model = Net().eval()
    lut = QuantizationSpec()
    config = KMeansPalettizerConfig.presets.w4(group_size=4)
    spec = config.global_config.op_state_spec["weight"]  # type: ignore[union-attr]
    spec = spec.model_copy(update={"lut_qspec": lut})
    config.global_config.op_state_spec = {"weight": spec}  # type: ignore[union-attr]
    palettizer = KMeansPalettizer(model, config)
    palettizer.prepare((X,), fold_batch_norm=True)
    source = palettizer.program() if through == "program" else palettizer.finalize(backend=through)
    activations = QuantizerConfig(global_config=ModuleQuantizerConfig(op_state_spec=None))
    quantizer = Quantizer(source, activations)
    prepared = quantizer.prepare((X,))
    quantizer.calibrate([X])
    finalized = quantizer.finalize(backend="torch")
    torch.testing.assert_close(finalized(X), prepared(X), rtol=1e-5, atol=1e-5)
    targets = [str(node.target) for node in finalized.graph.nodes]
    assert targets.count("graphopt.lut_to_dense.default") == 3
    assert sum("quantize_per_tensor" in t for t in targets) >= 6
    assert all(row.status != "quantized" for row in quantizer.summary())


def test_tables_and_activations_in_one_prepare_are_those_of_two_steps() -> None:
    model = Net().eval()
    tables = KMeansPalettizerConfig.presets.w4(group_size=4)
    activations = QuantizerConfig(global_config=ModuleQuantizerConfig(op_state_spec=None))
    combined = Quantizer(model, activations, palettization=tables)
    combined.prepare((X,))
    combined.calibrate([X])
    palettizer = KMeansPalettizer(model, tables)
    palettizer.prepare((X,), fold_batch_norm=True)
    two_steps = calibrated(palettizer.program(), activations)  # type: ignore[arg-type]
    one, two = combined.finalize(backend="torch"), two_steps.finalize(backend="torch")
    torch.testing.assert_close(one(X), two(X), rtol=0, atol=0)
    assert len(combined.summary().palettized) == 3


def test_weights_without_tables_are_quantized_in_the_same_prepare() -> None:
    tables = KMeansPalettizerConfig.presets.w4(group_size=4).without("fc")
    quantizer = Quantizer(Net().eval(), palettization=tables)
    quantizer.prepare((X,))
    table = quantizer.summary()
    assert {row.name for row in table.palettized} == {"conv.weight", "conv2.weight"}
    assert {row.name for row in table.quantized} == {"fc.weight"}


def test_weights_with_tables_keep_one_row_when_activations_are_quantized() -> None:
    model, x = (
        nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8)).eval(),
        torch.randn(2, 16),
    )
    palettizer = KMeansPalettizer(model)
    palettizer.prepare((x,))
    quantizer = Quantizer(palettizer.program())
    quantizer.prepare((x,))
    quantizer.calibrate([x])
    rows = quantizer.program().report()
    assert [(row.name, row.status) for row in rows] == [
        ("0.weight", "palettized"),
        ("2.weight", "palettized"),
    ]
    assert rows.activations
