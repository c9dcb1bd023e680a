"""Activations whose scales are computed from each tensor: the op, its arithmetic, configs, conversion."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.analysis.quantized import quantized_ops
from graphopt.errors import CompressionError, ConfigError
from graphopt.ops import round_by_range
from graphopt.passes import ExpandRangeRounding
from graphopt.passes.pass_manager import run_passes
from graphopt.quantization import (
    ModuleQuantizerConfig,
    OpQuantizerConfig,
    Quantizer,
    QuantizerConfig,
)
from graphopt.quantization.spec import PerBlockGranularity, PerChannelGranularity
from graphopt.specs import QuantizationSpec

X = torch.randn(6, 3, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(
    -3, 3, 6
).reshape(6, 1, 1)
YAML = """
quantization_config:
  global_config:
    op_input_spec: null
    op_output_spec: null
    op_state_spec:
      weight: {granularity: {type: per_channel}}
    op_type_config:
      linear:
        op_input_spec:
          "*":
            qscheme: asymmetric
            qparam_calculator_cls: dynamic
            granularity: {type: per_block, axis: -1, block_size: -1}
        op_output_spec: null
        op_state_spec:
          weight: {granularity: {type: per_channel}, qparam_calculator_cls: static}
"""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)).eval()


def rounded_inputs(**spec: object) -> QuantizerConfig:
    given = QuantizationSpec.model_validate({"qparam_calculator_cls": "dynamic", **spec})
    return QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_input_spec={"*": given}, op_output_spec=None)
    )


def test_rows_are_rounded_as_torch_rounds_tokens() -> None:
    ops, limits = quantized_ops(), (-128, 127, torch.int8)
    scale, zero = ops.choose_qparams_per_token_asymmetric(X, torch.int8)
    codes = ops.quantize_per_token(X, scale, zero, *limits)
    want = ops.dequantize_per_token(codes, scale, zero, *limits, torch.float32)
    got = round_by_range(X, [1, 1, -1], "int8", "asymmetric")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_one_scale_is_that_of_the_largest_value() -> None:
    step = max(float(X.max()) / 127, -float(X.min()) / 128)
    want = torch.fake_quantize_per_tensor_affine(X, step, 0, -128, 127)
    torch.testing.assert_close(round_by_range(X, [], "int8", "symmetric"), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("blocks", "scheme", "minimum"),
    itertools.product(([], [1, 1, -1], [-1, 3, 8]), ("symmetric", "asymmetric"), (False, True)),
)
def test_plain_ops_compute_the_same(blocks: list[int], scheme: str, minimum: bool) -> None:
    class Rounding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            op = torch.ops.graphopt.round_by_range.default
            narrow = op(x, blocks, "int4", scheme, minimum)
            return torch.cat([narrow, op(x, blocks, "uint8", scheme, minimum)])

    with_zeros = X.clone()
    with_zeros[2] = 0
    gm = graphopt.capture(Rounding(), (with_zeros,)).graph_module
    want = gm(with_zeros)
    assert run_passes(gm, [ExpandRangeRounding()])
    assert not any("round_by_range" in str(node.target) for node in gm.graph.nodes)
    # a quotient may be rounded to the other side of a tie: a step of few values
    near = torch.isclose(gm(with_zeros), want, rtol=1e-4, atol=1e-7)
    assert near.float().mean() > 0.995
    assert not run_passes(gm, [ExpandRangeRounding()])


def test_plain_ops_keep_sixteen_bits_and_the_size_of_the_batch() -> None:
    class Rounding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.graphopt.round_by_range(x, [1, 1, 8], "int8", "asymmetric", False)

    gm = graphopt.capture(Rounding(), (X.half(),)).graph_module
    run_passes(gm, [ExpandRangeRounding()])
    more = torch.cat([X, X]).half()
    assert gm(more).dtype is torch.float16
    want = round_by_range(more, [1, 1, 8], "int8", "asymmetric")
    assert torch.isclose(gm(more), want, rtol=2e-3, atol=0).float().mean() > 0.99


def test_no_data_are_needed_and_the_record_says_so() -> None:
    program = graphopt.compress(net(), (X,), QuantizerConfig.presets.w8a8_dynamic())
    record = program.report()
    rounded = [row for row in record.activations if row.status == "quantized"]
    assert len(rounded) == 2
    assert all("scales from each tensor" in row.detail and row.scale is None for row in rounded)
    with torch.no_grad():
        errors = (program.module()(X) - net()(X)).abs().amax(-1) / net()(X).abs().amax(-1)
    assert errors.max() < 0.03  # each token by its own scale: six decades apart


def test_yaml_and_classes_make_the_same_program(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "dynamic.yaml"
    path.write_text(YAML)
    by_file = graphopt.compress(net(), (X,), path).module()(X)
    quantizer = Quantizer(net(), QuantizerConfig.presets.w8a8_dynamic())
    prepared = quantizer.prepare((X,))
    by_class = quantizer.finalize(backend=graphopt.ExportBackend.Torch)(X)
    torch.testing.assert_close(by_file, by_class, rtol=1e-5, atol=0)
    torch.testing.assert_close(prepared(X), by_class, rtol=1e-5, atol=0)
    config = QuantizerConfig.presets.w4a8_dynamic()
    assert QuantizerConfig.from_dict(config.to_dict()) == config


def test_training_reaches_weights_behind_rounded_rows() -> None:
    quantizer = Quantizer(net(), QuantizerConfig.presets.w8a8_dynamic())
    prepared = quantizer.prepare((X,))
    with quantizer.training_mode():
        prepared(X / X.abs().amax((1, 2), keepdim=True)).square().sum().backward()
    assert all(bool(p.grad.any()) for p in prepared.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in prepared.parameters()) == 4


def test_error_feedback_sees_rounded_rows() -> None:
    data = [X / X.abs().amax((1, 2), keepdim=True)] * 3
    config = QuantizerConfig.presets.w4a8_dynamic()

    def error(calls: list[Tensor] | None) -> float:
        program = graphopt.compress(net(), (X,), config, calibration_data=calls)
        with torch.no_grad():
            return float((program.module()(data[0]) - net()(data[0])).norm())

    assert error(data) < 0.8 * error(None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qscheme": "symmetric_with_clipping"}, "cover every value"),
        ({"float_range": [0.0, 1.0]}, "follow each tensor"),
        ({"scale_dtype": "float16"}, "float32"),
        ({"fake_quantize_cls": "lsq"}, "not learned"),
    ],
)
def test_what_contradicts_scales_of_each_tensor_is_refused(
    changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        QuantizationSpec(qparam_calculator_cls="dynamic", **changes)  # type: ignore[arg-type]


def test_weights_have_no_dynamic_scales() -> None:
    spec = QuantizationSpec(qparam_calculator_cls="dynamic")
    for kind in (ModuleQuantizerConfig, OpQuantizerConfig):
        with pytest.raises(ConfigError, match="weights do not change"):
            kind(op_state_spec={"weight": spec})


def test_blocks_that_do_not_fit_are_refused_with_the_value() -> None:
    per_seven = rounded_inputs(granularity=PerBlockGranularity(axis=-1, block_size=7))
    with pytest.raises(CompressionError, match=r"input_1 .*blocks of 7 do not divide the 32"):
        graphopt.compress(net(), (X,), per_seven)
    with pytest.raises(CompressionError, match="rank 3"):
        graphopt.compress(net(), (X,), rounded_inputs(granularity=PerChannelGranularity(axis=3)))
    static = rounded_inputs(
        granularity=PerBlockGranularity(axis=-1, block_size=8), qparam_calculator_cls="static"
    )
    with pytest.raises(ConfigError, match="with qparam_calculator_cls 'dynamic', per block"):
        graphopt.compress(net(), (X,), static, calibration_data=[X])
