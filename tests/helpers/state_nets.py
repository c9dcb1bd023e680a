"""Small models that keep state between calls, or take inputs of any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["OPEN", "STATEFUL", "Case", "noise", "tokens"]

WIDTH, HEADS, CACHE = 32, 4, 8


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 90, shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """A model and calls of it, one behind the other.

    Attributes:
        build: Makes the model.
        calls: Inputs of each call.
        shapes: `dynamic_shapes` of its capture; None fixes every size.
    """

    build: Callable[[], nn.Module]
    calls: Sequence[tuple[Any, ...]]
    shapes: Any = field(default=None)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()


def _split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)


class CachedAttention(nn.Module):
    """Attention to a cache that each call writes at a position."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        shape = (1, HEADS, CACHE, WIDTH // HEADS)
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def put(self, cache: Tensor, position: Tensor, new: Tensor) -> Tensor:
        return cache.index_copy_(2, position, new)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        q, k, v = map(_split, self.qkv(x).chunk(3, -1))
        keys, values = self.put(self.keys, position, k), self.put(self.values, position, v)
        seen = torch.arange(CACHE) <= position[:, None]
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
        return self.out(y.transpose(1, 2).flatten(2))


class IndexPut(CachedAttention):
    def put(self, cache: Tensor, position: Tensor, new: Tensor) -> Tensor:
        cache[:, :, position] = new
        return cache


class Functional(CachedAttention):
    """A new cache is computed and copied over the old one."""

    def put(self, cache: Tensor, position: Tensor, new: Tensor) -> Tensor:
        cache.copy_(torch.index_copy(cache, 2, position, new))
        return cache


class Scattered(CachedAttention):
    def put(self, cache: Tensor, position: Tensor, new: Tensor) -> Tensor:
        place = position.reshape(1, 1, -1, 1).expand(new.shape)
        return cache.scatter_(2, place, new)


class Chosen(CachedAttention):
    """A mask says which row is written, as one-hot caches do."""

    def put(self, cache: Tensor, position: Tensor, new: Tensor) -> Tensor:
        here = (torch.arange(CACHE) == position).reshape(1, 1, CACHE, 1)
        cache.copy_(torch.where(here, new, cache))
        return cache


class SlidingWindow(nn.Module):
    """Attention to the last calls, which move up by one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        shape = (1, HEADS, CACHE, WIDTH // HEADS)
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))
        self.register_buffer("filled", torch.zeros(CACHE, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(_split, self.qkv(x).chunk(3, -1))
        self.keys.copy_(torch.cat([self.keys[:, :, 1:], k], 2))
        self.values.copy_(torch.cat([self.values[:, :, 1:], v], 2))
        self.filled[:-1] = self.filled[1:].clone()
        self.filled[-1] = True
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=self.filled[None])
        return self.out(y.transpose(1, 2).flatten(2))


class RingBuffer(nn.Module):
    """The mean of the last values, in a buffer that is written round and round."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 16)
        self.register_buffer("ring", torch.zeros(4, WIDTH))
        self.register_buffer("place", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.ring.index_copy_(0, self.place.reshape(1), torch.relu(self.first(x)))
        self.place.copy_((self.place + 1) % 4)
        return self.second(self.ring.mean(0, keepdim=True))


class Recurrent(nn.Module):
    """A GRU cell whose hidden state stays in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(16, WIDTH), nn.Linear(WIDTH, 16)
        self.register_buffer("hidden", torch.zeros(2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.hidden.copy_(self.cell(x, self.hidden))
        return self.out(self.hidden)


class Streaming(nn.Module):
    """Convolutions over time that keep the last frames."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(8, 32, 5), nn.Conv1d(32, 8, 3)
        self.register_buffer("before_first", torch.zeros(1, 8, 4))
        self.register_buffer("before_second", torch.zeros(1, 32, 2))

    def forward(self, x: Tensor) -> Tensor:
        given = torch.cat([self.before_first, x], -1)
        self.before_first.copy_(given[..., -4:])
        hidden = torch.cat([self.before_second, torch.relu(self.first(given))], -1)
        self.before_second.copy_(hidden[..., -2:])
        return self.second(hidden)


class Counters(nn.Module):
    """Counts, a running mean and flags, which start from other values than zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 16)
        self.register_buffer("calls", torch.tensor(70000))
        self.register_buffer("mean", torch.ones(WIDTH))
        self.register_buffer("seen", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.add_(3)
        hidden = self.first(x)
        self.mean.mul_(0.75).add_(hidden.mean(0) * 0.25)
        self.seen.logical_xor_(hidden.mean() > -9)
        return self.second(hidden - self.mean), self.calls + 0, self.seen.clone()


class ExplicitCache(nn.Module):
    """The cache goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = map(_split, self.qkv(x).chunk(3, -1))
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        y = F.scaled_dot_product_attention(q, keys, values)
        return self.out(y.transpose(1, 2).flatten(2)), keys, values


def _caches(length: int) -> tuple[Tensor, Tensor]:
    shape = (1, HEADS, length, WIDTH // HEADS)
    return noise(*shape, seed=length), noise(*shape, seed=length + 50)


def _cached(kind: type[CachedAttention]) -> Case:
    calls = [(noise(1, 1, WIDTH, seed=step), torch.tensor([step])) for step in range(4)]
    return Case(kind, calls)


def decoder(kind: str, **config: Any) -> nn.Module:
    """A tiny decoder of transformers with a static cache of 16 places."""
    import transformers
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    settings = {
        "vocab_size": 90,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "use_cache": True,
        **config,
    }
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**settings)
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))
    model.generation_config.cache_implementation = "static"
    return TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=16).model


class WhisperDecoder(nn.Module):
    """Whisper's decoder: a static cache of its own tokens, and attention to what the encoder gave."""

    def __init__(self) -> None:
        from transformers import WhisperConfig, WhisperForConditionalGeneration
        from transformers.cache_utils import StaticCache

        super().__init__()
        sizes = {"d_model": WIDTH, "vocab_size": 90, "num_mel_bins": 8, "max_source_positions": 20}
        layers = {"encoder_layers": 1, "decoder_layers": 2}
        heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
        wide = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        self.config = WhisperConfig(**sizes, **layers, **heads, **wide, **ids)
        whole = WhisperForConditionalGeneration(self.config)
        self.decoder, self.head = whole.get_decoder(), whole.proj_out
        self.cache = StaticCache(config=self.config, max_cache_len=16)
        self.cache.early_initialization(1, HEADS, WIDTH // HEADS, torch.float32, "cpu")
        for number, layer in enumerate(self.cache.layers):
            self.register_buffer(f"keys_{number}", layer.keys)
            self.register_buffer(f"values_{number}", layer.values)
            self.register_buffer(f"length_{number}", layer.cumulative_length)

    def forward(self, ids: Tensor, encoded: Tensor, position: Tensor) -> Tensor:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        for layer in self.cache.layers:
            layer.cumulative_length.copy_(position[0])
        cache = EncoderDecoderCache(self.cache, DynamicCache(config=self.config))
        found = self.decoder(
            input_ids=ids, encoder_hidden_states=encoded, cache=cache, use_cache=True
        )
        return self.head(found[0])


STATEFUL: dict[str, Case] = {
    "index_copy cache": _cached(CachedAttention),
    "index_put cache": _cached(IndexPut),
    "functional cache": _cached(Functional),
    "scattered cache": _cached(Scattered),
    "one-hot cache": _cached(Chosen),
    "sliding window": Case(SlidingWindow, [(noise(1, 1, WIDTH, seed=s),) for s in range(10)]),
    "ring buffer": Case(RingBuffer, [(noise(1, 16, seed=s),) for s in range(6)]),
    "GRU": Case(Recurrent, [(noise(2, 16, seed=s),) for s in range(4)]),
    "streaming convolution": Case(Streaming, [(noise(1, 8, 6, seed=s),) for s in range(4)]),
    "counters": Case(Counters, [(noise(4, 16, seed=s),) for s in range(4)]),
    "explicit cache": Case(
        ExplicitCache, [(noise(1, 1, WIDTH, seed=s), *_caches(5)) for s in range(2)]
    ),
    "Llama": Case(
        lambda: decoder("Llama"),
        [(tokens(1, 1, seed=s), None, torch.tensor([s])) for s in range(4)],
    ),
    "Qwen3": Case(
        lambda: decoder("Qwen3", head_dim=8),
        [(tokens(1, 1, seed=s), None, torch.tensor([s])) for s in range(4)],
    ),
    "Whisper decoder": Case(
        WhisperDecoder,
        [(tokens(1, 1, seed=s), noise(1, 20, WIDTH), torch.tensor([s])) for s in range(4)],
    ),
}


class Picture(nn.Module):
    """A small network of images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(image)))
        return self.head(F.silu(self.second(x)).mean((2, 3)))


class Detector(nn.Module):
    """Scores and boxes of every place of an image whose height and width are open."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.scores, self.boxes = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(torch.relu(self.stem(image)), 2)
        x = x + torch.relu(self.body(x))
        scores = torch.sigmoid(self.scores(x)).flatten(2).transpose(1, 2)
        y = torch.arange(x.shape[2], dtype=x.dtype)[:, None].expand(x.shape[2], x.shape[3])
        z = torch.arange(x.shape[3], dtype=x.dtype)[None, :].expand(x.shape[2], x.shape[3])
        corners = torch.stack([z, y, z, y])[None]
        return scores, (self.boxes(x) + corners).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """A transformer encoder over tokens of any number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(90, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


# name → model, its example, and the sizes that an artifact takes
OPEN: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, Any]]] = {
    "picture": (Picture, (noise(2, 3, 32, 32),), {"image": {0: (1, 4), 2: (16, 48), 3: (16, 48)}}),
    "encoder": (Encoder, (tokens(1, 12),), {"ids": {1: (2, 24)}}),
    "detector": (Detector, (noise(1, 3, 32, 24),), {"image": {2: (8, 40), 3: (8, 40)}}),
}
