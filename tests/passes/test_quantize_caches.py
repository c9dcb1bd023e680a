"""Caches in int8: a scale for each row that is written, others moved as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.state_nets import STATEFUL
from helpers.tiers import cases

import graphopt
from graphopt.errors import ConfigError, LoweringError
from graphopt.ir.program import Program
from graphopt.passes import QuantizeCaches
from graphopt.quantization import (
    KVCacheQuantConfig,
    ModuleQuantizerConfig,
    OpQuantizerConfig,
    QuantizationSpec,
    QuantizerConfig,
)


def cache_config(op: str = "index_copy", **output: Any) -> QuantizerConfig:
    spec = QuantizationSpec(**({"dtype": "int8"} | output))
    entry = KVCacheQuantConfig(op_quantizer_config=OpQuantizerConfig(op_output_spec={"*": spec}))
    return QuantizerConfig(
        global_config=ModuleQuantizerConfig(
            op_state_spec=None, op_input_spec=None, op_output_spec=None
        ),
        kv_cache_quant_configs={op: entry},
    )


def quantized(name: str, op: str = "index_copy") -> Program:
    case = STATEFUL[name]
    return graphopt.compress(case.model(), case.calls[0], cache_config(op))


@pytest.mark.parametrize(
    ("name", "op"), [("index_copy cache", "index_copy"), ("index_put cache", "index_put")]
)
def test_rows_are_rounded_when_they_are_written_and_never_again(name: str, op: str) -> None:
    case, module = STATEFUL[name], quantized(name, op).module()
    model = case.model()
    seen = []
    with torch.no_grad():
        for call in case.calls:
            want, found = model(*call), module(*call)
            assert float((found - want).abs().max()) < 0.02 * float(want.abs().max())
            held = module.keys.float() * module.keys_scale
            step = module.keys_scale.clamp_min(1e-9)
            assert bool(((held - model.keys).abs() <= 0.501 * step + 1e-7).all())
            seen.append(module.keys[:, :, 0].clone())
    assert all(torch.equal(seen[0], each) for each in seen)
    assert module.keys.dtype is torch.int8
    held_bytes = sum(each.bytes for each in quantized(name, op).state)
    # heads of 8 values: 8 bytes and a scale for 32
    assert held_bytes == 2 * 4 * 8 * (8 + 4)


@pytest.mark.integration
@pytest.mark.parametrize(
    "target", cases(["coreai", "executorch", "torch"], default=lambda target: target == "coreai")
)
def test_targets_run_quantized_caches(target: str, tmp_path: Path) -> None:
    artifact = graphopt.lower(quantized("index_copy cache"), target)
    calls = [graphopt.CallSequence(STATEFUL["index_copy cache"].calls)]
    artifact.save(tmp_path / f"m{artifact.suffix}", verify=calls)
    assert artifact.verification.max_error < 1e-3


def test_core_ml_refuses_them_with_the_reason() -> None:
    with pytest.raises(LoweringError, match="float16 and would be larger"):
        graphopt.lower(quantized("index_copy cache"), "coreml")


def test_what_updates_no_cache_is_refused() -> None:
    case = STATEFUL["GRU"]
    with pytest.raises(ConfigError, match="no cache is updated by"):
        graphopt.compress(case.model(), case.calls[0], cache_config())
    with pytest.raises(ConfigError, match="use one of"):
        graphopt.compress(case.model(), case.calls[0], cache_config("scatter"))
    with pytest.raises(ConfigError, match="symmetric int8"):
        cache_config(dtype="uint8")


def test_a_second_run_finds_no_cache() -> None:
    gm = quantized("index_copy cache").module()
    with pytest.raises(ConfigError, match="no cache"):
        QuantizeCaches(("index_copy",))(gm)
