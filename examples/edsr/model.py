"""EDSR (Lim et al., arXiv 1707.02921) for 2× super-resolution, and the photographs it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import skimage.io
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRAINING = (
    *("camera", "coffee", "rocket", "stereo_motorcycle", "hubble_deep_field", "coins"),
    *("brick", "grass", "gravel"),
)
HELD_OUT = ("astronaut", "chelsea", "immunohistochemistry")
# taken off outside the network, so that its input is centred; a value that 8-bit images have
MIDDLE = 128 / 255
BORDER = 2


class ResBlock(nn.Module):
    def __init__(self, feats: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(feats, feats, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(feats, feats, 3, padding=1)
        with torch.no_grad():
            self.conv2.weight.mul_(0.1)
            self.conv2.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.relu(self.conv1(x)))


class EDSR(nn.Module):
    """Takes and gives images less `MIDDLE`, [batch, 3, height, width]. The paper's r16f64 is EDSR(16, 64)."""

    def __init__(self, resblocks: int = 8, feats: int = 32) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, feats, 3, padding=1)
        self.body = nn.Sequential(*(ResBlock(feats) for _ in range(resblocks)))
        self.body_tail = nn.Conv2d(feats, feats, 3, padding=1)
        self.up = nn.Conv2d(feats, 4 * feats, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.tail = nn.Conv2d(feats, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        head = self.head(x)
        return self.tail(self.shuffle(self.up(head + self.body_tail(self.body(head)))))


def _as_tensor(image: np.ndarray) -> Tensor:
    """[1, 3, height, width] in [0, 1], height and width even; grey becomes RGB."""
    image = np.stack([image] * 3, -1) if image.ndim == 2 else image[..., :3]
    height, width = (size // 2 * 2 for size in image.shape[:2])
    return torch.from_numpy(image[:height, :width].copy()).permute(2, 0, 1)[None].float() / 255


def photographs(names: tuple[str, ...]) -> list[Tensor]:
    """Photographs that come with scikit-image."""
    found = []
    for name in names:
        image = getattr(skimage.data, name)()
        found.append(_as_tensor(image[0] if isinstance(image, tuple) else image))
    return found


def folder(path: Path) -> list[Tensor]:
    """The images of a folder, by name."""
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".png", ".jpg"))
    return [_as_tensor(skimage.io.imread(file)) for file in files]


def downsample(image: Tensor, factor: float = 0.5) -> Tensor:
    """Anti-aliased bicubic, stored as 8 bits."""
    small = F.interpolate(image, scale_factor=factor, mode="bicubic", antialias=True)
    return small.clamp(0, 1).mul(255).round().div(255)


def bicubic(image: Tensor) -> Tensor:
    """What the network is to beat; takes and gives images less `MIDDLE`."""
    return F.interpolate(image + MIDDLE, scale_factor=2, mode="bicubic") - MIDDLE


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB over RGB values in [0, 1], without a border of two pixels."""
    inside = (..., slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    error = (a.clamp(0, 1)[inside] - b.clamp(0, 1)[inside]).double().square().mean()
    return float(-10 * torch.log10(error))


def evaluate(
    model: Callable[[Tensor], Tensor],
    images: list[Tensor],
    reference: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Mean PSNR against the images themselves, or against another model's outputs."""
    with torch.no_grad():
        scores = []
        for image in images:
            small = downsample(image) - MIDDLE
            wanted = image if reference is None else reference(small) + MIDDLE
            scores.append(psnr(model(small) + MIDDLE, wanted))
    return sum(scores) / len(scores)


def train(
    model: EDSR, *, steps: int = 2000, batch: int = 16, patch: int = 24, seed: int = 0
) -> EDSR:
    """L1 on random patches, flipped and turned; cosine schedule with a short warm-up."""
    rng = np.random.default_rng(seed)
    pairs = [(image[0], downsample(image)[0]) for image in photographs(TRAINING)]
    chance = np.array([image.numel() ** 0.5 for image, _ in pairs])
    chance /= chance.sum()
    model = model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.5)

    def rate(step: int) -> float:
        return min((step + 1) / 50, 0.5 * (1 + float(np.cos(np.pi * step / steps))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in range(steps):
        inputs, targets = [], []
        for which in rng.choice(len(pairs), batch, p=chance):
            large, small = pairs[which]
            y, x = (int(rng.integers(size - patch + 1)) for size in small.shape[-2:])
            turn, flip = int(rng.integers(4)), bool(rng.integers(2))
            for store, image, scale in ((inputs, small, 1), (targets, large, 2)):
                rows = slice(scale * y, scale * (y + patch))
                crop = image[:, rows, scale * x : scale * (x + patch)]
                store.append(torch.rot90(crop.flip(-1) if flip else crop, turn, (-2, -1)))
        small = torch.stack(inputs).contiguous(memory_format=torch.channels_last) - MIDDLE
        optimizer.zero_grad()
        F.l1_loss(model(small), torch.stack(targets) - MIDDLE).backward()
        optimizer.step()
        schedule.step()
    return model.to(memory_format=torch.contiguous_format).eval()
