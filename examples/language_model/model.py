"""Small decoders of transformers, trained on the docstrings of Python's standard library, byte by byte."""

from __future__ import annotations

import ast
import itertools
import logging
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.extras import require

# imported without the lines that packages behind it print on their compiled parts
require("transformers.integrations.executorch", "examples")
import transformers  # noqa: E402
from transformers.integrations.executorch import (  # noqa: E402
    TorchExportableModuleForDecoderOnlyLM,
)

VOCABULARY = 256  # a token is a byte
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
OWN: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 32, "tie_word_embeddings": True},
}


def tokens(text: str) -> Tensor:
    """The bytes of a text, int64[length]."""
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def text_of(ids: Tensor) -> str:
    """The text that bytes stand for."""
    return bytes(ids.tolist()).decode(errors="replace")


def docstrings() -> Iterator[str]:
    """The docstrings of each module of the standard library, as one text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        text = "\n\n".join(each for each in found if each)
        if text:
            yield text + "\n\n"


def corpus(modules: int | None = None) -> tuple[Tensor, Tensor]:
    """Bytes to train on, and those of every tenth module, which are held out.

    Args:
        modules: Read only so many.
    """
    parts = list(itertools.islice(docstrings(), modules))
    held_out = "".join(parts[5::10])
    return tokens("".join(t for i, t in enumerate(parts) if i % 10 != 5)), tokens(held_out)


def build(kind: str, **sizes: Any) -> nn.Module:
    """A decoder of transformers with random weights.

    Args:
        kind: "Llama" or "Qwen3".
        sizes: Fields of its config other than `SIZES`.
    """
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **OWN[kind], **sizes})
    return getattr(transformers, f"{kind}ForCausalLM")(config)  # type: ignore[no-any-return]


def train(
    model: nn.Module, text: Tensor, *, steps: int, batch: int = 16, length: int = 128
) -> None:
    """Train with AdamW and one cosine, on pieces drawn from the text.

    Args:
        model: It is left in evaluation mode.
        text: int64[…].
        steps: How many.
        batch: Pieces a step.
        length: Tokens a piece.
    """
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))
    model.train()
    for step in range(steps):
        rate = min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        starts = torch.randint(0, len(text) - length - 1, (batch,), generator=draw)
        pieces = torch.stack([text[start : start + length + 1] for start in starts.tolist()])
        logits = model(input_ids=pieces[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == steps:
            logging.getLogger(__name__).info("step %d: %.3f nats per byte", step, loss.item())
    model.eval()


def with_cache(model: Any, length: int) -> nn.Module:
    """The decoder with a static cache in its buffers, as transformers exports it.

    Its inputs are `input_ids`, int64[1, n], and `cache_position`, int64[n], where they go.

    Args:
        model: A decoder of transformers.
        length: Positions of the cache.
    """
    model.generation_config.cache_implementation = "static"
    wrapped = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=length)
    return wrapped.model.eval()


def call(ids: Tensor, position: int = 0) -> dict[str, Tensor]:
    """Inputs of one call.

    Args:
        ids: int64[n].
        position: Where the first goes.
    """
    return {"input_ids": ids[None], "cache_position": torch.arange(position, position + len(ids))}
