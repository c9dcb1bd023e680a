from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.schemes.palettize import PalettizedWeight, palettize
from graphopt.schemes.quantize import QuantizedWeight, plan_blocks, quantize_weight
from graphopt.schemes.registry import scheme_of
from graphopt.schemes.relaxed import RelaxedPalette, RelaxedWeight
from graphopt.specs import (
    PalettizationSpec,
    PerBlockGranularity,
    PerChannelGranularity,
    PerGroupedChannelGranularity,
    QuantizationSpec,
)

CHANNELS = PerChannelGranularity()
WEIGHT = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
SPECS: dict[str, QuantizationSpec | PalettizationSpec] = {
    "int4": QuantizationSpec(dtype="int4", granularity=CHANNELS),
    "int8": QuantizationSpec(dtype="int8", granularity=CHANNELS),
    "uint3": QuantizationSpec(dtype="uint3", granularity=CHANNELS, qscheme="asymmetric"),
    "zero points": QuantizationSpec(dtype="int4", granularity=CHANNELS, qscheme="asymmetric"),
    "minimum": QuantizationSpec(
        dtype="int4", granularity=CHANNELS, qscheme="asymmetric", qformulation="minval"
    ),
    "blocks": QuantizationSpec(dtype="int2", granularity=PerBlockGranularity(block_size=4)),
    "table": PalettizationSpec(n_bits=3),
    "tables": PalettizationSpec(n_bits=2, granularity=PerGroupedChannelGranularity(group_size=4)),
    "tables of columns": PalettizationSpec(
        n_bits=2, granularity=PerGroupedChannelGranularity(group_size=4, axis=1)
    ),
    "int8 table": PalettizationSpec(n_bits=3, lut_qspec=QuantizationSpec(dtype="int8")),
    "scaled": PalettizationSpec(n_bits=3, enable_per_channel_scale=True),
    "one bit": PalettizationSpec(n_bits=1),
}


def form_of(
    spec: QuantizationSpec | PalettizationSpec, weight: Tensor = WEIGHT
) -> QuantizedWeight | PalettizedWeight:
    if isinstance(spec, PalettizationSpec):
        return palettize(weight, spec, output_axis=0)
    return quantize_weight(weight, spec, plan_blocks(weight.shape, 0, spec.granularity)[0])


def soft(name: str, target: Tensor = WEIGHT) -> tuple[RelaxedWeight, Tensor]:
    form = form_of(SPECS[name])
    relaxed = scheme_of(SPECS[name]).relax(form, SPECS[name], target)
    assert relaxed is not None
    return relaxed, form.dense()


@pytest.mark.parametrize("name", SPECS)
def test_frozen_weight_is_what_is_stored(name: str) -> None:
    relaxed, _ = soft(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        relaxed.v += torch.randn(relaxed.v.shape, generator=generator)
        relaxed.scales += 0.01 * torch.randn(relaxed.scales.shape, generator=generator)
    relaxed.frozen = True
    stored = relaxed.stored()
    tolerance = 1e-6
    torch.testing.assert_close(
        relaxed.dense().detach(), stored.dense(), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("name", SPECS)
def test_start_decides_for_the_form_that_was_given(name: str) -> None:
    relaxed, before = soft(name)
    torch.testing.assert_close(relaxed.stored().dense(), before, rtol=1e-6, atol=1e-6)
    assert relaxed.moved() == 0


@pytest.mark.parametrize("name", SPECS)
def test_start_is_between_the_given_form_and_the_weight(name: str) -> None:
    relaxed, before = soft(name)
    now = relaxed.dense().detach()
    assert float((now - WEIGHT).abs().sum()) < float((before - WEIGHT).abs().sum())
    assert float((now - before).abs().sum()) < float((WEIGHT - before).abs().sum())


@pytest.mark.parametrize("name", SPECS)
def test_gradients_reach_roundings_and_scales(name: str) -> None:
    relaxed, _ = soft(name)
    relaxed.dense().square().sum().backward()
    assert relaxed.v.grad is not None
    assert bool(relaxed.v.grad.any())
    quantized_tables = isinstance(relaxed, RelaxedPalette) and relaxed.form.lut_storage is not None
    assert (relaxed.scales.grad is None or not bool(relaxed.scales.grad.any())) == quantized_tables


def test_regulariser_is_least_where_everything_is_decided() -> None:
    relaxed, _ = soft("int4")
    with torch.no_grad():
        relaxed.v.fill_(9.0)
    assert float(relaxed.regulariser(2.0)) == 0
    assert relaxed.undecided() == 0
    with torch.no_grad():
        relaxed.v.zero_()
    assert float(relaxed.regulariser(2.0)) == 1
    assert relaxed.undecided() == WEIGHT.numel()
    assert relaxed.regulariser(20.0) >= relaxed.regulariser(2.0)


def test_levels_stay_on_the_grid_at_its_ends() -> None:
    spec = QuantizationSpec(dtype="int2", granularity=CHANNELS)
    weight = torch.tensor([[-5.0, 5.0, 0.0, 1.0]])
    form = quantize_weight(
        weight, spec, plan_blocks(weight.shape, 0, CHANNELS)[0], fixed=(torch.ones(1, 1), None)
    )
    relaxed = scheme_of(spec).relax(form, spec, weight)
    assert relaxed is not None
    for value in (-9.0, 9.0):
        with torch.no_grad():
            relaxed.v.fill_(value)
        assert set(relaxed.stored().dense().unique().tolist()) <= {-2.0, -1.0, 0.0, 1.0}


@pytest.mark.parametrize(
    "spec",
    [
        PalettizationSpec(n_bits=4, cluster_dim=2),
        PalettizationSpec(n_bits=2, outlier_fraction=0.02),
        QuantizationSpec(dtype="fp8_e4m3", granularity=CHANNELS),
        QuantizationSpec(dtype="fp4_e2m1", granularity=CHANNELS),
    ],
    ids=["vectors", "outliers", "fp8", "fp4"],
)
def test_forms_without_neighbouring_levels_are_not_relaxed(
    spec: QuantizationSpec | PalettizationSpec,
) -> None:
    assert scheme_of(spec).relax(form_of(spec), spec, WEIGHT) is None
