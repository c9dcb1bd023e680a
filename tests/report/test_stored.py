"""Sizes that are reported for a target are those that the target's file has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import JointConfig
from graphopt.mixed_precision import SizeModel
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.quantization import Quantizer, QuantizerConfig
from graphopt.report.stored import as_stored
from graphopt.specs import PalettizationSpec, PerGroupedChannelGranularity, QuantizationSpec

X = torch.randn(2, 384, generator=torch.Generator().manual_seed(0))


def compressed(spec: PalettizationSpec | QuantizationSpec) -> graphopt.CompressedProgram:
    model = nn.Sequential(nn.Linear(384, 512, bias=False)).eval()
    if isinstance(spec, PalettizationSpec):
        part: Any = KMeansPalettizerConfig.from_dict(
            {"global_config": {"op_state_spec": {"weight": spec.model_dump(mode="json")}}}
        )
        return graphopt.compress(model, (X,), JointConfig(palettization=part))
    return graphopt.compress(model, (X,), JointConfig(quantization=weights(spec.dtype)))


def weights(dtype: Any) -> QuantizerConfig:
    """Integers for weights, float activations."""
    slots = {"op_state_spec": {"weight": {"dtype": dtype}}}
    slots |= dict.fromkeys(("op_input_spec", "op_output_spec"))
    return QuantizerConfig.from_dict({"global_config": slots})


SPECS = {
    "3 bits": PalettizationSpec(n_bits=3),
    "3 bits in groups": PalettizationSpec(
        n_bits=3, granularity=PerGroupedChannelGranularity(axis=0, group_size=32)
    ),
    "3 bits, int8 entries": PalettizationSpec(n_bits=3, lut_qspec={"dtype": "int8"}),
    "3 bits of pairs": PalettizationSpec(n_bits=3, cluster_dim=2),
    "4 bits": PalettizationSpec(n_bits=4),
    "int3": QuantizationSpec(dtype="int3"),
    "int8": QuantizationSpec(dtype="int8"),
}


@pytest.mark.coreai
@pytest.mark.parametrize("name", SPECS)
def test_reported_bits_are_in_the_core_ai_file(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    program = compressed(spec)
    row = as_stored(program, "coreai")["0.weight"]
    priced = SizeModel("coreai", torch.float32).weight_bits(spec, (512, 384), 0)
    assert row.stored_bits == priced
    artifact = graphopt.lower(program, "coreai", precision="float32")
    artifact.save(tmp_path / "model.aimodel")
    # an unpadded code would leave 24 KiB more in the file than is reported
    assert 0 <= artifact.size - row.stored_bits // 8 < 12 * 1024


def test_without_a_target_codes_keep_their_width() -> None:
    program = compressed(SPECS["3 bits"])
    assert as_stored(program) == program.report()
    assert as_stored(program, "coreml").rows == program.report().rows
    assert as_stored(program)["0.weight"].stored_bits == 512 * 384 * 3 + 8 * 32


def test_compressor_classes_count_for_a_target() -> None:
    quantizer = Quantizer(nn.Sequential(nn.Linear(384, 512)).eval(), weights("int3"))
    quantizer.prepare((X,))
    plain, padded = quantizer.summary()["0.weight"], quantizer.summary("coreai")["0.weight"]
    assert padded.stored_bits - plain.stored_bits == 512 * 384 + 16 * 8
    assert "stored as 4-bit codes" in padded.note
