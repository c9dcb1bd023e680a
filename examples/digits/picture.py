"""The README's picture: accuracy of the digits CNN against the size of its saved artifact.

    python examples/digits/picture.py --out out/picture

Sizes are those of saved `.aimodel` files in float16, accuracies those of 450 held-out images.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from model import Split, accuracy, load, train
from torch import nn

import graphopt
from graphopt.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)

Point = tuple[str, float, int, float]  # method, bits per weight, bytes, accuracy in percent


def palettes(bits: int, algorithm: str) -> KMeansPalettizerConfig:
    """One table per weight, the same width everywhere."""
    spec = PalettizationSpec(n_bits=bits, algorithm=algorithm)
    return KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )


def points(
    model: nn.Module, batches: list[torch.Tensor], held: Split, out: Path
) -> Iterator[Point]:
    """Every method at every width, saved, measured."""
    example = (held[0][:1],)

    def saved(name: str, program: graphopt.Program, bits: float) -> Point:
        artifact = graphopt.lower(program, "coreai", precision="float16")
        artifact.save(out / f"{name.replace(' ', '-')}-{bits:g}.aimodel", overwrite=True)
        return name, bits, artifact.size, 100 * accuracy(program.module(), held)

    yield saved("float16", graphopt.capture(model, example), 16)
    for bits in (6, 4, 2, 1):  # 3 bits take the place of 4 in this target
        program = graphopt.compress(model, example, palettes(bits, "kmeans"), progress=False)
        yield saved("k-means, no data", program, bits)
    for bits in (4, 2, 1):
        program = graphopt.compress(
            model, example, palettes(bits, "gptq"), calibration_data=batches, progress=False
        )
        yield saved("output feedback, 512 unlabelled images", program, bits)


def draw(found: list[Point], path: Path) -> None:
    """Accuracies over sizes, each point with its bits per weight."""
    mpl.rcParams["svg.hashsalt"] = "graphopt"  # equal points, equal file
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for name, colour in zip(dict.fromkeys(row[0] for row in found), ("k", "C1", "C0"), strict=True):
        rows = [row for row in found if row[0] == name]
        sizes, scores = [row[2] / 1024 for row in rows], [row[3] for row in rows]
        axes.plot(sizes, scores, "o-", color=colour, label=name, markersize=5)
        for (_, bits, *_), size, score in zip(rows, sizes, scores, strict=True):
            place = (0, -13) if name.startswith("k-means") else (0, 6)
            axes.annotate(
                f"{bits:g} bit",
                (size, score),
                place,
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=colour,
            )
    axes.set(
        xlabel="KiB of the saved .aimodel", ylabel="accuracy, %", xlim=(0, None), ylim=(0, 110)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/picture"))
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    training, held = load()
    model = train(training)
    found = []
    for point in points(model, list(training[0][:512].split(64)), held, args.out):
        found.append(point)
        print("{}, {:g} bits: {:,} bytes, {:.2f} %".format(*point), flush=True)
    (args.out / "points.json").write_text(json.dumps(found, indent=1))
    draw(found, args.out / "accuracy.svg")


if __name__ == "__main__":
    main()
