from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiers import some
from search.mixed_precision.nets import pictures

import graphopt
from graphopt.mixed_precision import SizeModel, analyze
from graphopt.schemes.palettize import palettize
from graphopt.schemes.quantize import plan_blocks, quantize_weight
from graphopt.specs import (
    PalettizationSpec,
    PerBlockGranularity,
    PerChannelGranularity,
    PerGroupedChannelGranularity,
    QuantizationFormulation,
    QuantizationScheme,
    QuantizationSpec,
)

# of the published per-layer table of ResNet-50: KiB at 2, 4 and 6 bits, 32-bit table entries
PUBLISHED = {
    (64, 3, 7, 7): (2.31, 4.66, 7.14),
    (64, 64, 1, 1): (1.02, 2.06, 3.25),
    (64, 64, 3, 3): (9.02, 18.06, 27.25),
    (256, 64, 1, 1): (4.02, 8.06, 12.25),
}


@pytest.mark.parametrize("shape", PUBLISHED)
def test_published_sizes_are_reproduced_to_the_digit(shape: tuple[int, ...]) -> None:
    sizes = SizeModel(lut_dtype=torch.float32)
    found = [
        round(sizes.weight_bits(PalettizationSpec(n_bits=bits), shape, 0) / 8192, 2)
        for bits in (2, 4, 6)
    ]
    assert tuple(found) == PUBLISHED[shape]


GROUPED = PerGroupedChannelGranularity(group_size=4)
INT8 = QuantizationSpec()
UINT8 = QuantizationSpec(dtype=torch.uint8, qscheme=QuantizationScheme.ASYMMETRIC)
SPECS: list[PalettizationSpec | QuantizationSpec] = [
    *(PalettizationSpec(n_bits=bits) for bits in (1, 2, 3, 4, 6, 8)),
    PalettizationSpec(n_bits=3, granularity=GROUPED),
    PalettizationSpec(n_bits=4, granularity=PerGroupedChannelGranularity(axis=1, group_size=2)),
    PalettizationSpec(n_bits=6, cluster_dim=4),
    PalettizationSpec(n_bits=4, lut_qspec=INT8, granularity=GROUPED),
    PalettizationSpec(n_bits=4, lut_qspec=UINT8),
    PalettizationSpec(n_bits=2, enable_per_channel_scale=True),
    PalettizationSpec(n_bits=4, outlier_fraction=0.02),
    QuantizationSpec(granularity=PerChannelGranularity()),
    QuantizationSpec(dtype=torch.int4, granularity=PerBlockGranularity(block_size=2)),
    QuantizationSpec(
        dtype=torch.uint4,
        qscheme=QuantizationScheme.ASYMMETRIC,
        granularity=PerChannelGranularity(),
    ),
    QuantizationSpec(
        dtype=torch.int8,
        qscheme=QuantizationScheme.ASYMMETRIC,
        qformulation=QuantizationFormulation.MINVAL,
    ),
    QuantizationSpec(dtype=torch.float8_e4m3fn, granularity=PerChannelGranularity()),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_prices_are_what_the_stored_form_takes(spec: Any) -> None:
    weight = torch.randn(12, 6, 3).half()
    if isinstance(spec, PalettizationSpec):
        stored = palettize(weight, spec)
    else:
        stored = quantize_weight(weight, spec, plan_blocks(weight.shape, 0, spec.granularity)[0])
    assert SizeModel().weight_bits(spec, weight.shape, 0) == stored.stored_bits()


def test_uncompressed_weights_cost_their_float_type() -> None:
    assert SizeModel().weight_bits(None, (3, 5), 0) == 240
    assert SizeModel(float_dtype=torch.float32).weight_bits(None, (3, 5), 0) == 480


def test_padding_of_the_target_is_priced() -> None:
    spec = PalettizationSpec(n_bits=3)
    plain = SizeModel().weight_bits(spec, (64, 64), 0)
    padded = SizeModel(backend="coreai").weight_bits(spec, (64, 64), 0)
    assert plain == 64 * 64 * 3 + 8 * 16
    assert padded == 64 * 64 * 4 + 16 * 16
    int6 = QuantizationSpec(dtype=torch.int6, granularity=PerChannelGranularity())
    table = 64 * 8  # a table with every value of the type
    assert (
        SizeModel(backend="coreai").weight_bits(int6, (64, 64), 0) == 64 * 64 * 6 + 64 * 16 + table
    )


@pytest.mark.integration
@pytest.mark.coreai
@pytest.mark.parametrize("name", some(["3-bit", "4-bit", "int8"], lambda name: name == "3-bit"))
def test_a_saved_artifact_differs_by_the_predicted_bytes(name: str, tmp_path: Path) -> None:
    """Against the artifact of 8-bit palettes, which has as many constants and ops."""
    x = pictures()
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 64, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64 * 36, 64)
    ).eval()
    table = analyze(model, (x[0],), [8, 3, 4, "int8"], x, backend="coreai")
    found = []
    for each in ("8-bit", name):
        recipe = table.uniform(each)
        program = graphopt.compress(model, (x[0],), recipe.to_config(), correct_statistics=False)
        artifact = graphopt.lower(program, "coreai", precision="float16")
        artifact.save(tmp_path / f"{each}.aimodel")
        found.append((recipe.bytes, artifact.size))
    (predicted, size), (other_predicted, other_size) = found
    assert abs((size - other_size) - (predicted - other_predicted)) < 2000  # of 147 KiB
