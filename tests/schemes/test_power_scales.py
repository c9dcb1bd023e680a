"""Scales that are powers of two take a byte only where a target stores them so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.mixed_precision import SizeModel
from graphopt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from graphopt.specs import PerChannelGranularity, QuantizationSpec

INT8 = QuantizationSpec(granularity=PerChannelGranularity(), scale_dtype="e8m0")
FP8 = QuantizationSpec(
    dtype="fp8_e4m3", granularity=PerChannelGranularity(), scale_dtype="e8m0", algorithm="nearest"
)


@pytest.mark.parametrize(
    ("backend", "spec", "bits", "note"),
    [
        (None, INT8, 8, ""),
        ("torch", INT8, 8, ""),
        ("coreai", INT8, 32, "scales stored as float32"),
        ("coreml", INT8, 32, "scales stored as float32"),
        ("onnx", INT8, 32, "scales stored as float32"),
        ("coreai", FP8, 8, ""),
        ("onnx", FP8, 32, "scales stored as float32"),
    ],
)
def test_a_summary_counts_them_as_the_target_stores_them(
    backend: str | None, spec: QuantizationSpec, bits: int, note: str
) -> None:
    torch.manual_seed(0)
    module = ModuleQuantizerConfig(
        op_state_spec={"weight": spec}, op_input_spec=None, op_output_spec=None
    )
    quantizer = Quantizer(
        nn.Sequential(nn.Linear(32, 16)).eval(), QuantizerConfig(global_config=module)
    )
    quantizer.prepare((torch.randn(2, 32),))
    (row,) = quantizer.summary(backend)
    assert row.stored_bits == 8 * 16 * 32 + bits * 16
    assert note in row.note
    sizes = SizeModel.of(backend, torch.float32)
    assert sizes.weight_bits(spec, (16, 32), 0) == row.stored_bits
