"""ResNet-18 for 32×32 images, on CIFAR-10 or on scikit-learn's digits."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Data = tuple[Tensor, Tensor]


class BasicBlock(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + identity)


class ResNet18(nn.Module):
    """21 convolution and linear weights; the stem is the 3×3 one that small images want."""

    def __init__(self, width: int = 64, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        inputs = width
        for stage in range(4):
            out = width * 2**stage
            blocks = [BasicBlock(inputs, out, 1 if stage == 0 else 2), BasicBlock(out, out, 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            inputs = out
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def multiplications(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of convolutions and linear layers for one image."""
    total = 0

    def count(module: nn.Module, _: object, y: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        total += module.weight[0].numel() * y[0].numel()

    handles = [
        each.register_forward_hook(count)
        for each in model.modules()
        if isinstance(each, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return total


def digits() -> tuple[Data, Data]:
    """Images at 32×32 and labels of scikit-learn's digits: for training, and held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(32, 32), mode="bilinear")
    labels = torch.tensor(found.target)
    held = torch.arange(len(labels)) % 3 == 0
    return (images[~held], labels[~held]), (images[held], labels[held])


def cifar10(folder: Path) -> tuple[Data, Data]:
    """The python version of CIFAR-10, unpacked: `data_batch_1` … `data_batch_5` and `test_batch`."""
    mean = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]
    spread = torch.tensor([0.2470, 0.2435, 0.2616])[:, None, None]

    def read(names: list[str]) -> Data:
        images, labels = [], []
        for name in names:
            with (folder / name).open("rb") as file:
                # the published files are pickles: read only a copy that you trust
                part = pickle.load(file, encoding="bytes")
            images.append(np.asarray(part[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
            labels += list(part[b"labels"])
        pixels = torch.from_numpy(np.concatenate(images)).float() / 255
        return (pixels - mean) / spread, torch.tensor(labels)

    return read([f"data_batch_{number}" for number in range(1, 6)]), read(["test_batch"])


def train(model: nn.Module, data: Data, epochs: int, rate: float, mirror: bool) -> None:
    """AdamW with a one-cycle schedule, images shifted by up to two pixels (and mirrored)."""
    x, y = data
    batch = 64
    optimizer = torch.optim.AdamW(model.parameters(), rate / 2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, epochs=epochs, steps_per_epoch=-(-len(y) // batch)
    )
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(y)).split(batch):
            optimizer.zero_grad()
            images = torch.roll(x[part], tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
            if mirror and bool(torch.randint(2, ())):
                images = images.flip(3)
            F.cross_entropy(model(images), y[part]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def trained(path: Path, data: Data, width: int, epochs: int, seed: int, mirror: bool) -> ResNet18:
    """The network, trained once and kept at `path`."""
    torch.manual_seed(seed)
    model = ResNet18(width, data[0].shape[1])
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    train(model, data, epochs, 4e-3, mirror)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model
