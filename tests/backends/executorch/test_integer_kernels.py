"""XNNPACK's own kernels of linear layers: rows rounded at run time, and floats beside integers."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.backends.executorch.dynamic import RowsByRange
from graphopt.backends.executorch.integer_kernels import is_packed
from graphopt.backends.executorch.lower import legal_passes
from graphopt.errors import ConfigWarning
from graphopt.passes import DequantizeToShiftScale
from graphopt.passes.pass_manager import run_passes
from graphopt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from graphopt.quantization.spec import PerBlockGranularity
from graphopt.specs import QuantizationScheme, QuantizationSpec

PRESETS = ModuleQuantizerConfig.presets
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
    [[0.01], [1.0], [100.0]]
)
EVERY_KERNEL = QuantizerConfig(
    global_config=None,
    module_name_configs={
        "0": PRESETS.w8a8_dynamic(),
        "2": PRESETS.w4a8_dynamic(),
        "4": PRESETS.w4(),
        "6": PRESETS.w8(),
    },
)


def net(between: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = (64, 96, 64, 64, 32)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    parts = [part for layer in layers for part in (layer, between())]
    return nn.Sequential(*parts[:-1]).eval()


def targets_of(gm: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.integration
@pytest.mark.executorch
def test_all_four_kernels_are_delegated_with_their_layers_and_right(tmp_path: Path) -> None:
    program = graphopt.compress(net(), (X,), EVERY_KERNEL)
    artifact = graphopt.lower(program, "executorch")
    artifact.save(tmp_path / "model.pte", max_error=1e-5)
    assert artifact.delegation.outside == {}
    assert artifact.delegation.notes == ()
    inside = artifact.delegation.inside
    assert inside["aten.linear.default"] == 4
    assert inside["quantized_decomposed.quantize_per_token.default"] == 2
    assert inside["quantized_decomposed.dequantize_per_channel_group.default"] == 1
    weights = sum(-(-row.stored_bits // 8) for row in program.report())
    assert artifact.size < weights + 12_000


@pytest.mark.parametrize(
    "changes",
    [
        {"qscheme": QuantizationScheme.SYMMETRIC},
        {"granularity": PerBlockGranularity(axis=-1, block_size=16)},
        {"dtype": "uint8"},
    ],
)
def test_roundings_that_xnnpack_has_not_become_plain_ops(changes: dict[str, object]) -> None:
    token = {
        "qscheme": "asymmetric",
        "qparam_calculator_cls": "dynamic",
        "granularity": PerBlockGranularity(axis=-1, block_size=-1),
    }
    spec = QuantizationSpec.model_validate({**token, **changes})
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_input_spec={"*": spec}, op_output_spec=None)
    )
    # values that are not bounded below keep the scheme that is asked for
    legal = graphopt.compress(net(nn.Tanh), (X,), config).copy()
    want = legal.module()(X)
    assert not run_passes(legal.graph_module, [RowsByRange()])
    run_passes(legal.graph_module, list(legal_passes("auto")))
    assert not any("per_token" in target for target in targets_of(legal.graph_module))
    error = (legal.module()(X) - want).norm() / want.norm()
    assert error < 1e-2  # a tie may fall to the other side


def test_rows_by_range_rewrites_once_and_keeps_the_values() -> None:
    legal = graphopt.compress(net(), (X,), EVERY_KERNEL).copy()
    want = legal.module()(X)
    assert run_passes(legal.graph_module, [RowsByRange()])
    assert sum("choose_qparams" in target for target in targets_of(legal.graph_module)) == 2
    torch.testing.assert_close(legal.module()(X), want, rtol=1e-4, atol=1e-4)
    assert not run_passes(legal.graph_module, [RowsByRange()])


def test_scales_of_blocks_that_are_no_bfloat16_are_packed_and_said() -> None:
    weight = QuantizationSpec(dtype="int4", granularity=PerBlockGranularity(block_size=32))
    dynamic = PRESETS.w8a8_dynamic().op_type_config["linear"]
    assert dynamic is not None
    module = ModuleQuantizerConfig(
        op_input_spec=dynamic.op_input_spec, op_output_spec=None, op_state_spec={"weight": weight}
    )
    legal = graphopt.compress(net(), (X,), QuantizerConfig(global_config=module)).copy()
    gm = legal.graph_module
    run_passes(gm, [DequantizeToShiftScale(), RowsByRange()])
    held = [n for n in gm.graph.nodes if "shift_scale" in str(n.target)]
    assert len(held) == 4
    assert all(is_packed(node) for node in held)


def test_packing_takes_what_a_kernel_would_widen_only_where_asked() -> None:
    spec = QuantizationSpec(dtype="int6")
    module = ModuleQuantizerConfig(
        op_input_spec=None, op_output_spec=None, op_state_spec={"weight": spec}
    )
    gm = graphopt.compress(net(), (X,), QuantizerConfig(global_config=module)).graph_module
    node = next(n for n in gm.graph.nodes if "shift_scale" in str(n.target))
    assert not is_packed(node)
    assert is_packed(node, tightly=True)
    assert is_packed(node, kernels=False)


def test_convolution_between_integers_stays_one_with_integers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU()).eval()
    x = torch.randn(2, 8, 6, 6)
    config = QuantizerConfig.presets.w8a8()
    program = graphopt.compress(model, (x,), config, [x], backend="executorch")
    gm = program.module()
    run_passes(gm, legal_passes("auto"))
    targets = targets_of(gm)
    assert "aten.conv2d.default" in targets
    assert "aten.linear.default" not in targets
    assert "quantized_decomposed.dequantize_per_channel.default" in targets


@pytest.mark.parametrize("told", [True, False])
def test_finalizing_says_which_layers_executorchs_own_partitioner_takes_wrong(told: bool) -> None:
    x = (torch.randn(4, 8),)
    backend = "executorch" if told else None
    quantizer = Quantizer(nn.Sequential(nn.Linear(8, 4)).eval())
    quantizer.prepare(x, backend=backend)
    quantizer.calibrate([x])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantizer.finalize(backend="executorch")
    texts = [str(each.message) for each in caught if each.category is ConfigWarning]
    assert any("linear" in text and 'backend="executorch"' in text for text in texts) is not told


@pytest.mark.integration
@pytest.mark.executorch
def test_notes_say_which_option_lets_convolutions_compute_with_integers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 4, 1), nn.ReLU()).eval()
    x = (torch.randn(2, 3, 8, 8),)
    for backend, hinted in ((None, True), ("executorch", False)):
        program = graphopt.compress(model, x, {"quantization": {}}, [x], backend=backend)
        notes = graphopt.lower(program, "executorch").delegation.notes
        assert any('backend="executorch"' in note for note in notes) == hinted


@pytest.mark.integration
@pytest.mark.executorch
@pytest.mark.parametrize("activation", [nn.Mish, nn.Softplus, nn.LogSigmoid, nn.Tanhshrink])
def test_activations_in_pieces_behind_convolutions_are_right(
    activation: type[nn.Module], tmp_path: Path
) -> None:
    """XNNPACK keeps the results of convolutions with channels last, and turns them once per reader."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), activation()).eval()
    image = torch.randn(1, 3, 8, 8)
    small = graphopt.compress(
        model,
        (image,),
        QuantizerConfig.presets.w8a8_affine(),
        calibration_data=[image],
        backend="executorch",
    )
    artifact = graphopt.lower(small, "executorch")
    artifact.save(tmp_path / "net.pte")
    assert artifact.verification.max_error < 1e-6
