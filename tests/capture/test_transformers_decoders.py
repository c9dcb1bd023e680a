"""Decoders of transformers as they are given, and programs of them in other processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.state_nets import tokens

import graphopt

_SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": _SIZES,
    "Qwen3": {**_SIZES, "head_dim": 8},
    "GPT2": {"vocab_size": 90, "n_embd": 32, "n_layer": 1, "n_head": 4},
}


def decoder(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**KINDS[kind])).eval()


@pytest.mark.integration
@pytest.mark.parametrize(
    "kind", ["Llama", *(pytest.param(k, marks=pytest.mark.slow) for k in ("Qwen3", "GPT2"))]
)
def test_a_decoder_is_captured_as_it_is_given(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = decoder(kind)
    assert model.config.use_cache
    with caplog.at_level("INFO", logger="graphopt"):
        program = graphopt.capture(model, (tokens(1, 6),))
    assert "captured with use_cache=False" in caplog.text
    assert "TorchExportableModuleForDecoderOnlyLM(model" in caplog.text
    assert model.config.use_cache  # as it was
    for length in (6, 9):
        ids = tokens(1, length, seed=2)
        with torch.no_grad():
            wanted = model(ids, use_cache=False).logits
            found = program.module()(ids).logits
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


_READ = """
import sys
import graphopt
from graphopt.errors import CaptureError
assert "transformers" not in sys.modules
try:
    program = graphopt.capture(sys.argv[1])
except CaptureError as error:
    assert "`import transformers.modeling_outputs` before it is read" in str(error), error
    import transformers.modeling_outputs
    program = graphopt.capture(sys.argv[1])
print(type(program.module()(*program.example_args)).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_process_without_transformers_is_told_what_to_import(kind: str, tmp_path: Path) -> None:
    small = graphopt.compress(decoder(kind), (tokens(1, 6),), {"palettization": {}})
    path = small.save(tmp_path / "decoder.pt2")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _READ, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().startswith("CausalLM")
