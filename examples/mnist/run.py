"""Palettization of a small CNN with coreai-opt's API: presets, grouped tables, finalize, artifact.

python examples/mnist/run.py                       # scikit-learn's digits
python examples/mnist/run.py --mnist FOLDER        # the four idx files of MNIST, .gz or not
"""

from __future__ import annotations

import argparse
import gzip
import struct
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity

Split = tuple[Tensor, Tensor]
MEAN, STD = 0.1307, 0.3081


def read_idx(folder: Path, stem: str) -> np.ndarray:
    """One file of MNIST's idx format (magic number, sizes, bytes)."""
    for name in (stem, stem.replace("-idx", ".idx")):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.exists():
                opener = gzip.open if path.suffix == ".gz" else open
                with opener(path, "rb") as stream:
                    data = stream.read()
                rank = data[3]
                shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
                return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)
    raise SystemExit(f"{folder} holds no {stem}[.gz]")


def load_mnist(folder: Path) -> tuple[Split, Split]:
    """(train, test) of MNIST, normalised; images [n, 1, 28, 28]."""

    def split(part: str) -> Split:
        images = torch.from_numpy(read_idx(folder, f"{part}-images-idx3-ubyte").copy())
        labels = torch.from_numpy(read_idx(folder, f"{part}-labels-idx1-ubyte").copy())
        return (images[:, None].float() / 255 - MEAN) / STD, labels.long()

    return split("train"), split("t10k")


def load_digits_as_mnist() -> tuple[Split, Split]:
    """scikit-learn's digits enlarged to 28×28, every fourth one held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = (F.interpolate(images, size=28, mode="bilinear") - MEAN) / STD
    labels = torch.tensor(digits.target, dtype=torch.int64)
    test = torch.arange(len(labels)) % 4 == 0
    return (images[~test], labels[~test]), (images[test], labels[test])


def make_model() -> nn.Module:
    """Conv2d → ReLU → MaxPool → Flatten → Linear."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


def train(model: nn.Module, data: Split, epochs: int) -> None:
    """Adam on cross-entropy."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(data[1])).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(data[0][batch]), data[1][batch]).backward()
            optimizer.step()


def accuracy(model: nn.Module, data: Split) -> float:
    """Percent of images that the model names."""
    with torch.no_grad():
        hits = [
            (model(images).argmax(1) == labels).float().sum()
            for images, labels in zip(data[0].split(256), data[1].split(256), strict=True)
        ]
    return 100 * float(torch.stack(hits).sum()) / len(data[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's idx files")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("out/mnist"))
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    torch.manual_seed(0)
    train_data, test_data = load_mnist(args.mnist) if args.mnist else load_digits_as_mnist()

    model = make_model()
    train(model, train_data, args.epochs)
    weights = Path(tempfile.mkdtemp()) / "baseline.pt"
    torch.save(model.state_dict(), weights)
    print(f"float32: {accuracy(model.eval(), test_data):.2f} %")

    grouped = PalettizationSpec(
        n_bits=4, granularity=PerGroupedChannelGranularity(axis=0, group_size=2)
    )
    experiments = {
        "4-bit": KMeansPalettizerConfig(),
        "4-bit, groups of 2": KMeansPalettizerConfig(
            global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": grouped})
        ),
        "2-bit": KMeansPalettizerConfig(
            global_config=ModuleKMeansPalettizerConfig(
                op_state_spec={"weight": PalettizationSpec(n_bits=2)}
            )
        ),
    }
    example = (test_data[0][:1],)
    for name, config in experiments.items():
        model.load_state_dict(torch.load(weights))
        palettizer = KMeansPalettizer(model, config)
        prepared = palettizer.prepare(example)
        finalized = palettizer.finalize(backend=graphopt.ExportBackend.CoreAI)
        artifact = graphopt.lower(finalized, graphopt.ExportBackend.CoreAI, example)
        path = artifact.save(
            args.out / f"{name.replace(', ', '-').replace(' ', '-')}.aimodel", overwrite=True
        )
        print(
            f"{name}: {accuracy(prepared, test_data):.2f} %,"
            f" {palettizer.summary().bits_per_weight:.3f} bits per weight,"
            f" {artifact.size / 1024:.1f} KiB in {path},"
            f" differs from PyTorch by {artifact.verify().max_error:.1e}"
        )


if __name__ == "__main__":
    main()
