"""Networks that compression is compared on: trained with a seed or packaged, with data and a score.

Everything that was trained is kept in a folder and taken from there the next time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import presets
import quantization_nets

EXAMPLES = Path(__file__).parents[2] / "examples"
Call = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A net and what it is measured with.

    Attributes:
        net: In evaluation mode.
        calls: Calibration inputs.
        held_out: Inputs of one call each, not among them.
        score: Outputs of those → the task's score.
        unit: What the score is.
        transformer: Whether it is one.
    """

    net: nn.Module
    calls: list[Call]
    held_out: list[Call]
    score: Callable[[list[Tensor]], float]
    unit: str
    transformer: bool = False


def _of_preset(
    made: presets.Case, score: Callable[[list[Tensor]], float], transformer: bool
) -> Case:
    calls, size = [(x,) for x in made.calls], len(made.calls[0])
    held = [(part,) for x in made.held_out for part in x.split(size)]
    return Case(made.net, calls, held, score, made.unit, transformer)


def _correct(labels: Tensor) -> Callable[[list[Tensor]], float]:
    return lambda found: 100 * float((torch.cat(found).argmax(-1) == labels).float().mean())


def encoder(seed: int) -> Case:
    """The packaged sentence encoder, calibrated on 384 sentences that the seed draws."""
    sys.path.insert(0, str(EXAMPLES / "sentence_encoder"))
    sys.modules.pop("model", None)
    from model import batches, encoded, load

    lines = (EXAMPLES / "sentence_encoder" / "calibration.txt").read_text().splitlines()
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = lines[:384] if seed == 0 else [lines[place] for place in order[:384]]
    net, held = load(), batches("evaluation")
    with torch.no_grad():
        wanted = [net(*batch) for batch in held]

    def cosine(found: list[Tensor]) -> float:
        return float(F.cosine_similarity(torch.cat(found), torch.cat(wanted)).mean())

    return Case(net, encoded(sorted(chosen, key=len)), held, cosine, "mean cosine", True)


def _images(made: quantization_nets.Case) -> Case:
    net, calls, held = made
    labels = quantization_nets._digits()[1][1400:1656]
    return Case(net, calls, held, _correct(labels), "% correct")


def resnet(seed: int) -> Case:
    """As ResNet-18, of width 16, trained on digits."""
    return _images(quantization_nets.resnet(seed))


def mobilenet_v2(seed: int) -> Case:
    """Width 0.35, trained on digits."""
    return _images(quantization_nets.mobilenet_v2(seed))


def vit(seed: int) -> Case:
    """Three layers of width 64, trained on digits."""
    labels = presets._digits(32)[1][1]
    return _of_preset(presets.vit(seed), _correct(labels), True)


def edsr(seed: int) -> Case:
    """EDSR r4f24 for 2× super-resolution, trained on scikit-image's photographs."""
    made = presets.super_resolution(seed)
    from model import HELD_OUT, MIDDLE, downsample, photographs, psnr

    images = [
        image[..., y : y + 128, x : x + 128]
        for image in photographs(HELD_OUT)
        for y in (0, 128)
        for x in (0, 128)
    ]
    held = [(downsample(image) - MIDDLE,) for image in images]

    def decibels(found: list[Tensor]) -> float:
        each = [psnr(y + MIDDLE, image) for y, image in zip(found, images, strict=True)]
        return sum(each) / len(each)

    return Case(made.net, [(x,) for x in made.calls], held, decibels, made.unit)


def decoder(seed: int) -> Case:
    """A Llama of three layers with grouped queries, trained on letters."""
    made = presets.decoder(seed)
    text = presets._letters()
    rest = text[len(text) * 9 // 10 :]
    targets = torch.stack([rest[s : s + 65] for s in range(0, len(rest) - 65, 65)])[:, 1:]

    def perplexity(found: list[Tensor]) -> float:
        return math.exp(float(F.cross_entropy(torch.cat(found).flatten(0, 1), targets.flatten())))

    return _of_preset(made, perplexity, True)


NETS: dict[str, Callable[[int], Case]] = {
    each.__name__: each for each in (encoder, resnet, mobilenet_v2, vit, edsr, decoder)
}


def case(name: str, seed: int, folder: Path) -> Case:
    """A net by name; trained once for each seed, and kept in a folder."""
    path = folder / f"{name}-{seed}.pt"
    if name == "encoder":
        return encoder(seed)
    if not path.exists():
        made = NETS[name](seed)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(made.net.state_dict(), path)
        return made
    state, trainers = torch.load(path, weights_only=True), _without_training()
    with trainers:
        made = NETS[name](seed)
    made.net.load_state_dict(state)
    return made


@contextmanager
def _without_training() -> Iterator[None]:
    """Let the builders of nets hand them on as they are."""
    kept = presets.train, quantization_nets.train, presets.EDSR_STEPS
    presets.train = lambda net, *args, **options: net.eval()
    quantization_nets.train = lambda *args: None
    presets.EDSR_STEPS = 1
    try:
        yield
    finally:
        presets.train, quantization_nets.train, presets.EDSR_STEPS = kept
