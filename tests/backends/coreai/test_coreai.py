"""What Core AI alone holds, and modules finalized for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tables_on_targets import ARGS, SPECS, palettized
from helpers.tiers import some

import graphopt
from graphopt.analysis.stored_values import find_lookups
from graphopt.backends import lowering
from graphopt.palettization import (
    PalettizationSpec,
)
from graphopt.quantization import QuantizationSpec


@pytest.mark.integration
@pytest.mark.coreai
@pytest.mark.parametrize("name", some(SPECS, lambda name: name in list(SPECS)[::4]))
def test_module_finalized_for_core_ai_goes_to_every_other_target(name: str) -> None:
    palettizer = palettized(SPECS[name])
    neutral = palettizer.program()
    finalized = palettizer.finalize(backend="coreai")
    torch.testing.assert_close(finalized(*ARGS)[0], neutral.graph_module(*ARGS)[0])
    raised = lowering.as_program(finalized, ARGS)
    torch.testing.assert_close(raised.graph_module(*ARGS)[0], neutral.graph_module(*ARGS)[0])
    before, after = find_lookups(neutral.graph_module), find_lookups(raised.graph_module)
    assert [lookup.n_bits for lookup in before] == [lookup.n_bits for lookup in after]
    assert [lookup.lut_dtype for lookup in before] == [lookup.lut_dtype for lookup in after]
    assert [lookup.outliers for lookup in before] == [lookup.outliers for lookup in after]
    masks = [
        {name for name, _ in each.graph_module.named_buffers() if name.endswith("_outlier_mask")}
        for each in (neutral, raised)
    ]
    assert masks[0] == masks[1]
    assert not any("coreai" in str(n.target) for n in raised.graph_module.graph.nodes)


@pytest.mark.integration
@pytest.mark.coreai
def test_core_ai_takes_fp8_tables(tmp_path: Path) -> None:
    spec = PalettizationSpec(lut_qspec=QuantizationSpec(dtype=torch.float8_e4m3fn))
    artifact = graphopt.lower(palettized(spec).program(), "coreai")
    artifact.save(tmp_path / "net.aimodel")
    assert artifact.verification.max_error < 1e-6
