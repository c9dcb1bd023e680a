"""ResNet-50 as torchvision writes it, and a small one of the same code for digits."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * self.expansion
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + identity)


class ResNet(nn.Module):
    """Names of parameters are torchvision's, so that its checkpoints load."""

    def __init__(self, blocks: tuple[int, ...], width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = width
        for number, count in enumerate(blocks):
            stage = []
            for place in range(count):
                stride = 2 if place == 0 and number > 0 else 1
                stage.append(Bottleneck(inputs, width * 2**number, stride))
                inputs = width * 2**number * Bottleneck.expansion
            setattr(self, f"layer{number + 1}", nn.Sequential(*stage))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def resnet50(weights: Path | None = None) -> ResNet:
    """ResNet-50, 54 convolution and linear weights; `weights` is torchvision's resnet50-*.pth."""
    model = ResNet((3, 4, 6, 3), 64, 3, 1000)
    if weights is not None:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


def small_resnet() -> ResNet:
    """The stand-in: two blocks per stage at a quarter of the width, 30 weights."""
    return ResNet((2, 2, 2, 2), 16, 1, 10)


Data = tuple[Tensor, Tensor]


def digits() -> tuple[Data, Data]:
    """Images at 32×32 and labels of scikit-learn's digits: for training, and held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(32, 32), mode="bilinear")
    labels = torch.tensor(found.target)
    held = torch.arange(len(labels)) % 3 == 0
    return (images[~held], labels[~held]), (images[held], labels[held])


def trained(path: Path, epochs: int = 12) -> ResNet:
    """The stand-in, trained once and kept at `path`."""
    model = small_resnet()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    torch.manual_seed(0)
    model = small_resnet()
    (x, y), _ = digits()
    batch = 64
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 4e-3, epochs=epochs, steps_per_epoch=-(-len(y) // batch)
    )
    for _ in range(epochs):
        for part in torch.randperm(len(y)).split(batch):
            optimizer.zero_grad()
            moved = torch.roll(x[part], tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
            F.cross_entropy(model(moved), y[part]).backward()
            optimizer.step()
            schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def imagenet(folder: Path, count: int, batch: int) -> list[Data]:
    """Batches of a folder `<class>/<image>` with the classes in sorted order, preprocessed as usual.

    Every n-th image is taken, so that `count` of them cover all classes.
    """
    import numpy as np
    from PIL import Image

    classes = sorted(each.name for each in folder.iterdir() if each.is_dir())
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).iterdir())
    ]
    chosen = files[:: max(1, len(files) // count)][:count]
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def read(path: Path) -> Tensor:
        with Image.open(path) as file:
            image = file.convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR
        )
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32)
        return ((torch.from_numpy(pixels) / 255 - mean) / spread).permute(2, 0, 1)

    parts = [chosen[start : start + batch] for start in range(0, len(chosen), batch)]
    return [
        (torch.stack([read(path) for path, _ in part]), torch.tensor([label for _, label in part]))
        for part in parts
    ]
