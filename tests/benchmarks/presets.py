"""What each family's preset costs on a small net of that family, trained here.

python tests/benchmarks/presets.py [--families cnn bert …]

A row per family: bits per weight, the task's score of the float net and of the compressed one, and the
PSNR of its outputs on data that nothing was fitted to.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import graphopt
from graphopt.config.presets import preset
from graphopt.search.mixed_precision.metrics import METRICS

EXAMPLES = Path(__file__).parents[2] / "examples"
EDSR_STEPS = 400


@dataclass(frozen=True)
class Case:
    """A trained net with its data.

    Attributes:
        net: In evaluation mode.
        calls: Calibration inputs.
        held_out: Inputs of one call each, not among them.
        score: Module → the task's score.
        unit: What the score is.
    """

    net: nn.Module
    calls: list[Any]
    held_out: list[Any]
    score: Callable[[Callable[..., Tensor]], float]
    unit: str


class Take(nn.Module):
    """A transformers model that gives one of its outputs."""

    def __init__(self, model: nn.Module, take: Callable[[Any], Tensor], **options: Any) -> None:
        super().__init__()
        self.model, self.take, self.options = model, take, options

    def forward(self, x: Tensor) -> Tensor:
        return self.take(self.model(x, **self.options))


def train(
    net: nn.Module,
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    steps: int,
    rate: float = 2e-3,
    seed: int = 0,
) -> nn.Module:
    """Cross entropy along the last axis, Adam with a cosine schedule."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for _ in range(steps):
        x, target = draw(generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x).flatten(0, -2), target.flatten()).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def _accuracy(x: Tensor, labels: Tensor) -> Callable[[Callable[..., Tensor]], float]:
    return lambda module: 100 * float((module(x).argmax(-1) == labels).float().mean())


def _digits(size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear")
    labels = torch.tensor(data.target)
    held = torch.arange(len(labels)) % 4 == 0
    return (images[~held], labels[~held]), (images[held], labels[held])


def cnn() -> Case:
    sys.path.insert(0, str(EXAMPLES / "digits"))
    from model import load
    from model import train as train_digits

    (x, y), held = load()
    net = train_digits((x, y))
    return Case(net, list(x[:512].split(64)), [held[0]], _accuracy(*held), "% correct")


def vit(seed: int = 0) -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    (x, y), held = _digits(32)
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        num_channels=1,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    net = Take(ViTForImageClassification(config), lambda out: out.logits)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(y), (64,), generator=generator)
        return x[rows], y[rows]

    train(net, draw, 400, seed=seed)
    return Case(net, list(x[:512].split(64)), [held[0]], _accuracy(*held), "% correct")


def bert() -> Case:
    sys.path.insert(0, str(EXAMPLES / "sentence_encoder"))
    sys.modules.pop("model", None)  # the examples' modules have one name
    from model import batches, cosine, load

    net, held = load(), batches("evaluation")
    with torch.no_grad():
        wanted = [net(*batch) for batch in held]
    calls = batches("calibration", limit=384)
    return Case(net, calls, held, lambda module: cosine(module, held, wanted), "mean cosine")


def _letters() -> Tensor:
    text = (EXAMPLES / "sentence_encoder" / "calibration.txt").read_text().lower()
    known = sorted(set(text))
    return torch.tensor([known.index(letter) for letter in text])


def decoder(seed: int = 0) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    text = _letters()
    part = text[: len(text) * 9 // 10]
    rest = text[len(part) :]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=int(text.max()) + 1,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    net = Take(LlamaForCausalLM(config), lambda out: out.logits, use_cache=False)

    def windows(source: Tensor, starts: Tensor) -> Tensor:
        return torch.stack([source[start : start + 65] for start in starts.tolist()])

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = windows(part, torch.randint(len(part) - 65, (24,), generator=generator))
        return rows[:, :-1], rows[:, 1:]

    train(net, draw, 500, seed=seed)
    held = windows(rest, torch.arange(0, len(rest) - 65, 65))
    calls = windows(part, torch.arange(0, len(part) - 65, 200))[:256, :-1]

    def perplexity(module: Callable[..., Tensor]) -> float:
        loss = F.cross_entropy(module(held[:, :-1]).flatten(0, 1), held[:, 1:].flatten())
        return float(loss.exp())

    return Case(net, list(calls.split(32)), [held[:, :-1]], perplexity, "perplexity per letter")


def super_resolution(seed: int = 0) -> Case:
    sys.path.insert(0, str(EXAMPLES / "edsr"))
    sys.modules.pop("model", None)
    from model import EDSR, HELD_OUT, MIDDLE, TRAINING, downsample, evaluate, photographs
    from model import train as train_edsr

    torch.manual_seed(seed)
    net = train_edsr(EDSR(4, 24), steps=EDSR_STEPS, seed=seed).eval()
    images = [image[..., :256, :256] for image in photographs(HELD_OUT)]
    held = [downsample(image) - MIDDLE for image in images]
    calls = [downsample(image[..., :128, :128]) - MIDDLE for image in photographs(TRAINING)]
    return Case(net, calls, held, lambda module: evaluate(module, images), "dB to the image")


def speech() -> Case:
    """Ten words of three pure tones each, in noise, as bands of energy over time."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = WhisperConfig(
                d_model=64,
                encoder_layers=2,
                encoder_attention_heads=4,
                encoder_ffn_dim=128,
                num_mel_bins=32,
                max_source_positions=24,
            )
            self.encoder, self.head = WhisperEncoder(config), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x).last_hidden_state.mean(1))

    tones = torch.randint(32, (10, 3), generator=torch.Generator().manual_seed(7))

    def draw(generator: torch.Generator, count: int = 64) -> tuple[Tensor, Tensor]:
        words = torch.randint(10, (count,), generator=generator)
        x = 1.5 * torch.randn(count, 32, 48, generator=generator)
        for part in range(3):
            x[torch.arange(count), tones[words, part], 16 * part : 16 * part + 16] += 1.2
        return x, words

    torch.manual_seed(0)
    net = train(Words(), draw, 300)
    x, words = draw(torch.Generator().manual_seed(1), 1024)
    calls = list(draw(torch.Generator().manual_seed(2), 512)[0].split(64))
    return Case(net, calls, [x], _accuracy(x, words), "% correct")


FAMILIES = {each.__name__: each for each in (cnn, vit, bert, decoder, super_resolution, speech)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    warnings.simplefilter("ignore")
    table = Table(title="presets by family, data of calibration and evaluation apart")
    for heading in ("preset", "bits/weight", "score", "float", "compressed", "PSNR dB", "CPU s"):
        table.add_column(heading, justify="left" if heading in ("preset", "score") else "right")
    for family in parser.parse_args().families:
        case = FAMILIES[family]()
        started = time.process_time()
        example = case.calls[0] if isinstance(case.calls[0], tuple) else (case.calls[0],)
        program = graphopt.compress(case.net, example, preset(family), case.calls)
        seconds, module = time.process_time() - started, program.module()
        with torch.no_grad():
            pairs = [
                (module(*args), case.net(*args))
                for args in (x if isinstance(x, tuple) else (x,) for x in case.held_out)
            ]
            psnr = sum(METRICS["psnr"].compare(got, want) for got, want in pairs) / len(pairs)
            scores = case.score(case.net), case.score(module)
        table.add_row(
            family,
            f"{program.report().overall_bits_per_weight:.2f}",
            case.unit,
            *(f"{score:.4g}" for score in scores),
            f"{psnr:.1f}",
            f"{seconds:.0f}",
        )
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
