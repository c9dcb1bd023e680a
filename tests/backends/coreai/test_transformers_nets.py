"""Whole networks of transformers on the Core AI runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.transformers_nets import NETS, built

import graphopt
from graphopt.errors import LoweringError

pytestmark = [pytest.mark.coreai, pytest.mark.slow]
BLOCKS = {
    "op_state_spec": {
        "weight": {
            "dtype": "int4",
            "granularity": {"type": "per_block", "block_size": 8, "axis": 1},
        }
    },
    "op_input_spec": None,
    "op_output_spec": None,
}
# config → largest difference, for a last step of rounded activations and what it grows to
CONFIGS: dict[str, tuple[Any, float]] = {
    "tables": ({"palettization": {}}, 1e-3),
    "W8A8": ({"quantization": {}}, 0.1),
    "int4 blocks": ({"quantization": {"global_config": BLOCKS}}, 1e-3),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", NETS)
def test_networks_run_as_in_pytorch(name: str, config: str, tmp_path: Path) -> None:
    model, args = built(name)
    given, limit = CONFIGS[config]
    program = graphopt.compress(model, args, given, calibration_data=[args])
    try:
        artifact = graphopt.lower(program, "coreai")
    except LoweringError as refused:
        with pytest.raises(LoweringError):
            graphopt.lower(graphopt.capture(model, args), "coreai")
        pytest.skip(f"{name} is refused uncompressed, too: {refused}")
    artifact.save(tmp_path / "net.aimodel", verify=False)
    assert artifact.verify().max_error < limit
