"""Palettize a pretrained sentence encoder at 4, 3 and 2 bits from unlabelled sentences.

python examples/sentence_encoder/run.py --out out/sentence_encoder

Every linear and embedding weight becomes tables: groups of 16 output channels share one, an
embedding has one. Calibrated on calibration.txt, measured on evaluation.txt against the embeddings
of the uncompressed model.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from model import batches, cosine, load
from rich.console import Console
from rich.table import Table

import graphopt
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    OpKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity


def config(bits: int, algorithm: str) -> KMeansPalettizerConfig:
    groups = PerGroupedChannelGranularity(axis=0, group_size=16)
    linear = PalettizationSpec(n_bits=bits, granularity=groups, algorithm=algorithm)
    embedding = PalettizationSpec(n_bits=bits, algorithm=algorithm)
    return KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(
            op_state_spec={"weight": linear},
            op_type_config={
                "embedding": OpKMeansPalettizerConfig(op_state_spec={"weight": embedding})
            },
        )
    )


def plot(points: dict[str, list[tuple[float, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, found in points.items():
        axes.plot(*zip(*found, strict=True), marker="o", label=name)
    axes.set_xlabel("stored bits per weight, tables included")
    axes.set_ylabel("mean cosine similarity to FP32")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/sentence_encoder"))
    parser.add_argument("--sentences", type=int, default=None, help="calibrate on fewer sentences")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--tune-steps", type=int, default=0, help="tune tables and biases as well")
    args = parser.parse_args()
    console = Console(width=110)
    warnings.simplefilter("ignore", FutureWarning)
    started = time.perf_counter()

    model = load()
    calibration, evaluation = batches("calibration", limit=args.sentences), batches("evaluation")
    with torch.no_grad():
        wanted = [model(*batch) for batch in evaluation]
    reference = graphopt.capture(model, calibration[-1])

    title = f"{sum(len(ids) for ids, _ in evaluation)} held-out sentences"
    table = Table(title=title)
    for heading in (
        "bits",
        "bits/weight",
        "MiB",
        "k-means",
        "output feedback",
        "tuned",
        "seconds",
        ".aimodel MiB",
        "Core AI diff",
    ):
        table.add_column(heading, justify="right")
    points: dict[str, list[tuple[float, float]]] = {"k-means": [], "calibrated": []}
    for bits in args.bits:
        begun = time.perf_counter()
        palettizer = KMeansPalettizer(reference, config(bits, "gptq"))
        prepared = palettizer.prepare()
        plain = cosine(prepared, evaluation, wanted)
        palettizer.calibrate(calibration)
        fitted = cosine(prepared, evaluation, wanted)
        program, best, tuned = palettizer.program(), fitted, "-"
        if args.tune_steps:
            program = graphopt.tune(
                program, reference, calibration, steps=args.tune_steps, learning_rate=0.04
            )
            best = cosine(program.module(), evaluation, wanted)
            tuned = f"{best:.4f}"
        seconds = time.perf_counter() - begun
        summary = palettizer.summary()
        artifact = graphopt.lower(program, graphopt.ExportBackend.CoreAI)
        artifact.save(args.out / f"encoder-{bits}-bit.aimodel", overwrite=True)
        table.add_row(
            str(bits),
            f"{summary.bits_per_weight:.3f}",
            f"{summary.stored_bytes / 2**20:.2f}",
            f"{plain:.4f}",
            f"{fitted:.4f}",
            tuned,
            f"{seconds:.0f}",
            f"{artifact.size / 2**20:.2f}",
            f"{artifact.verify().max_error:.1e}",
        )
        points["k-means"].append((summary.bits_per_weight, plain))
        points["calibrated"].append((summary.bits_per_weight, best))
    console.print(table)
    plot(points, args.out / "accuracy.png")
    console.print("mean cosine similarity to the embeddings of the uncompressed model")
    console.print("diff: largest difference to PyTorch, relative to the largest output")
    console.print(f"{time.perf_counter() - started:.0f} s in all; artifacts and plot in {args.out}")


if __name__ == "__main__":
    main()
