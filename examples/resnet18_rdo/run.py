"""Rate-distortion-optimised mixed-precision quantization of a ResNet-18 for 32×32 images.

    python examples/resnet18_rdo/run.py --out out/resnet18_rdo

By default a ResNet-18 of width 16 is trained on scikit-learn's digits. With the python version of
CIFAR-10 unpacked in a folder, the published setting at its full width:

    python examples/resnet18_rdo/run.py --cifar10 cifar-10-batches-py --width 64 --epochs 30

Printed is the published table: float, uniform 8-bit, uniform 4-bit, and rate-distortion optimisation at
4.19 bits per weight from 4, 6 and 8 bits; then at 3.0 bits from 2, 3, 4, 6 and 8 bits, and with palettes.
No label is used but for the accuracies.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from model import Data, cifar10, digits, multiplications, train, trained
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from graphopt import rdo

WANTED = (
    ("4, 6, 8 bits", {"target_bits": 4.19, "candidates": [4, 6, 8]}),
    ("2, 3, 4, 6, 8 bits", {"target_bits": 3.0, "candidates": [2, 3, 4, 6, 8]}),
    (
        "palettes of 2 to 8 bits",
        {"target_bits": 3.0, "candidates": [2, 3, 4, 6, 8], "family": "palette"},
    ),
)


class Accuracy:
    """100 for each held-out image that is classified right, else 0."""

    def __init__(self, held: Data, batch: int) -> None:
        self.images, self.labels, self.batch = *held, batch

    def __call__(self, model: nn.Module) -> Tensor:
        found = [model(x).argmax(1) for x in self.images.split(self.batch)]
        return 100.0 * (torch.cat(found) == self.labels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/resnet18_rdo"))
    parser.add_argument("--cifar10", type=Path, help="folder with data_batch_1 … test_batch")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument(
        "--fine-tune", type=int, default=0, help="further epochs at a tenth the rate"
    )
    parser.add_argument("--images", type=int, default=512, help="unlabelled, for calibration")
    parser.add_argument("--test", type=int, default=2000, help="held-out images at most")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1000, help="of adaptive rounding per block")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    console = Console(width=110)
    warnings.simplefilter("ignore", FutureWarning)

    known, held = digits() if args.cifar10 is None else cifar10(args.cifar10)
    held = held[0][: args.test], held[1][: args.test]
    started = time.perf_counter()
    mirror = args.cifar10 is not None
    model = trained(
        args.out / f"width{args.width}.pt", known, args.width, args.epochs, args.seed, mirror
    )
    if args.fine_tune:
        train(model, known, args.fine_tune, 4e-4, mirror)
    console.print(
        f"{multiplications(model, held[0][:1]) / 1e6:.1f} million multiply-accumulates,"
        f" {sum(p.numel() for p in model.parameters()):,} parameters;"
        f" trained in {time.perf_counter() - started:.0f} s"
    )
    drawn = torch.randperm(len(known[0]), generator=torch.Generator().manual_seed(args.seed))
    calibration = list(known[0][drawn[: args.images]].split(args.batch))
    score = Accuracy(held, 256)

    table = Table(title=f"{len(held[0])} held-out images, {args.images} calibration images")
    for heading in ("", "accuracy %", "drop, points", "bits/weight", "compression", "KL", "s"):
        table.add_column(heading, justify="left" if not heading else "right")
    for number, (name, config) in enumerate(WANTED):
        begun = time.perf_counter()
        folder = args.out / f"{config['target_bits']}-{config.get('family', 'integer')}"
        program, report = rdo.optimize(
            model,
            (held[0][:1],),
            calibration,
            {**config, "seed": args.seed, "rounding": {"steps": args.steps}},
            out=folder,
            overwrite=True,
            evaluate=score,
            evaluation_data=held[0].split(256),
        )
        seconds = time.perf_counter() - begun
        for row in report.comparison[3 if number else 0 :]:
            ours = row.name == "rate-distortion"
            table.add_row(
                f"{row.name}, {name}" if ours else row.name,
                f"{row.score:.2f}",
                f"{row.drop:.2f} ± {row.error:.2f}",
                f"{row.bits_per_weight:.3f}",
                f"{row.ratio:.2f}×",
                f"{row.distance:.2g}",
                f"{seconds:.0f}" if ours else "",
            )
        console.print(report)
        program.save(folder / "resnet18.aimodel")
    console.print(table)
    console.print(f"{time.perf_counter() - started:.0f} s in all; everything in {args.out}")


if __name__ == "__main__":
    main()
