"""Mixed-precision palettization of a ResNet: layer-wise sensitivity, recipe, sweep.

    python examples/resnet50_mixed_precision/run.py --out out/resnet50_mixed_precision

By default a small ResNet of the same code is trained on scikit-learn's digits. With ImageNet at hand
(folders `<class>/<image>`, and torchvision's checkpoint):

    python examples/resnet50_mixed_precision/run.py --weights resnet50-11ad3fa6.pth \\
        --calibration imagenet/train --validation imagenet/val

Printed are the published workflow's tables: each layer alone, and FP16, uniform, greedy and our
recipes at one target; then the curve over bits per weight.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from model import Data, digits, imagenet, resnet50, trained
from rich.console import Console
from rich.table import Table
from torch import nn

import graphopt
from graphopt.errors import InfeasibleError
from graphopt.mixed_precision import METRICS, Recipe, SensitivityTable, Sweep, analyze


class Scores:
    """Top-1, and distances to the uncompressed model's outputs, on held-out images."""

    def __init__(self, model: nn.Module, batches: Sequence[Data]) -> None:
        self.batches = batches
        with torch.no_grad():
            self.wanted = [model(x) for x, _ in batches]

    def __call__(self, model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            found = [model(x) for x, _ in self.batches]
        right = sum(
            int((z.argmax(1) == y).sum()) for z, (_, y) in zip(found, self.batches, strict=True)
        )
        total = sum(len(y) for _, y in self.batches)
        means = {
            name: float(
                np.mean(
                    [METRICS[name].compare(*pair) for pair in zip(found, self.wanted, strict=True)]
                )
            )
            for name in ("psnr", "kl")
        }
        return {"top1": 100 * right / total, **means}

    def top1(self, model: nn.Module) -> float:
        return self(model)["top1"]


def data(args: argparse.Namespace) -> tuple[nn.Module, list[torch.Tensor], list[Data]]:
    """Model, unlabelled calibration batches, held-out batches."""
    if args.weights is not None:
        calibration = imagenet(args.calibration, args.images, args.batch)
        held = imagenet(args.validation, args.held_out, args.batch)
        return resnet50(args.weights), [x for x, _ in calibration], held
    (x, _), (images, labels) = digits()
    model = trained(args.out / "small_resnet.pt")
    held = list(zip(images.split(args.batch), labels.split(args.batch), strict=True))
    return model, list(x[: args.images].split(args.batch)), held


def row(table: Table, name: str, recipe: Recipe, scores: dict[str, float]) -> None:
    kinds = ", ".join(f"{n}× {name}" for name, (n, _) in recipe.distribution.items())
    table.add_row(
        name,
        f"{recipe.bits_per_weight:.3f}",
        f"{recipe.bytes / 2**20:.3f}",
        f"{scores['top1']:.2f}",
        f"{scores['psnr']:.2f}",
        f"{scores['kl']:.5f}",
        kinds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/resnet50_mixed_precision"))
    parser.add_argument("--weights", type=Path, help="torchvision's ResNet-50 checkpoint")
    parser.add_argument("--calibration", type=Path, help="folder of ImageNet images")
    parser.add_argument("--validation", type=Path, help="folder of ImageNet images")
    parser.add_argument(
        "--images", type=int, default=512, help="for sensitivities; the article: 2560"
    )
    parser.add_argument("--held-out", type=int, default=50_000, help="for top-1, of --validation")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--target", type=float, default=4.0, help="bits per weight")
    parser.add_argument("--points", type=int, default=9, help="of the curve from 2 to 6 bits")
    args = parser.parse_args()
    console = Console(width=130)
    warnings.simplefilter("ignore", FutureWarning)
    started = time.perf_counter()
    model, calibration, held = data(args)
    example = (calibration[0][:1],)
    score = Scores(model, held)

    # 1. layer-wise sensitivity, as published: PSNR of the logits, one layer compressed at a time
    begun = time.perf_counter()
    plain = analyze(
        model,
        example,
        args.bits,
        calibration,
        mode="hybrid",
        path=args.out / "psnr.sensitivity.jsonl",
    )
    console.print(plain)
    plain.plot().figure.savefig(args.out / "sensitivity.png", dpi=150)
    console.print(f"sensitivity of {len(plain.layers)} layers: {time.perf_counter() - begun:.0f} s")
    # the same under the corrections that are applied below, by what they do to the class probabilities
    aware = analyze(
        model,
        example,
        args.bits,
        calibration,
        "kl",
        mode="hybrid",
        correction="statistics",
        path=args.out / "kl.sensitivity.jsonl",
    )

    # 2. recipes at one target
    results = Table(
        title=f"target {args.target:g} bits per weight, {sum(len(y) for _, y in held)}"
        " held-out images"
    )
    for heading in ("", "bits/weight", "MiB", "top-1 %", "PSNR dB", "KL", "layers"):
        results.add_column(heading, justify="left" if heading in ("", "layers") else "right")
    flat = f"{min(args.bits, key=lambda bits: abs(bits - args.target))}-bit"
    row(results, "FP16", plain.uniform("keep"), score(plain.program.module()))
    row(results, f"uniform {flat}", plain.uniform(flat), score(plain.apply(plain.uniform(flat))))
    try:
        greedy = plain.recipe(target_bpw=args.target, solver="greedy")
        row(results, "greedy", greedy, score(plain.apply(greedy)))
    except InfeasibleError as error:
        console.print(f"greedy: {error}")
    ours = plain.refine(plain.recipe(target_bpw=args.target), calibration)
    row(results, "MILP, refined", ours, score(plain.apply(ours)))
    best = aware.refine(aware.recipe(target_bpw=args.target), calibration)
    tuned = aware.apply(best, calibration, algorithm="gptq")
    row(results, "MILP, refined; fitted to data", best, score(tuned))
    console.print(results)
    best.save(args.out / "recipe.yaml", overwrite=True)
    artifact = graphopt.lower(tuned, graphopt.ExportBackend.CoreAI, example)
    artifact.save(args.out / "resnet.aimodel", overwrite=True)
    console.print(
        f"{artifact.path}: {artifact.size:,} bytes, differs from PyTorch by"
        f" {artifact.verify().max_error:.1e}"
    )

    # 3. the curve
    curves = sweeps(plain, aware, calibration, score, args)
    for name, curve in curves.items():
        console.print(f"{name}:", curve)
    plot(curves, args.out / "curve.png")
    console.print(f"{time.perf_counter() - started:.0f} s in all; everything in {args.out}")


def sweeps(
    plain: SensitivityTable,
    aware: SensitivityTable,
    calibration: list[torch.Tensor],
    score: Scores,
    args: argparse.Namespace,
) -> dict[str, Sweep]:
    targets = np.linspace(2, 6, args.points)
    return {
        "greedy": plain.sweep(targets, score.top1, solver="greedy", uniform=False, score="top-1 %"),
        "MILP, refined": plain.sweep(targets, score.top1, refine_with=calibration, score="top-1 %"),
        "fitted to data": aware.sweep(
            targets,
            score.top1,
            refine_with=calibration,
            uniform=False,
            score="top-1 %",
            apply=lambda recipe: aware.apply(recipe, calibration, algorithm="gptq"),
        ),
    }


def plot(curves: dict[str, Sweep], path: Path) -> None:
    axes = curves["MILP, refined"].plot()
    for name in ("greedy", "fitted to data"):
        found = curves[name].of_kind("recipe")
        axes.plot(
            [point.bits_per_weight for point in found],
            [point.score for point in found],
            marker=".",
            linestyle=":",
            label=name,
        )
    axes.legend()
    axes.figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
