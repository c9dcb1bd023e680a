"""Train, palettize at 4 and 2 bits, write Core AI and Core ML artifacts, run them, print a table.

python examples/digits/run.py --out out/digits
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

from model import accuracy, load, train
from rich.console import Console
from rich.table import Table

import graphopt
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/digits"))
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()
    console = Console(width=110)
    warnings.simplefilter("ignore", FutureWarning)

    train_data, test_data = load()
    started = time.perf_counter()
    model = train(train_data, epochs=args.epochs)
    console.print(f"trained in {time.perf_counter() - started:.1f} s")
    example = (test_data[0][:1],)
    weights = sum(p.numel() for p in model.parameters())

    table = Table(title="digits CNN, 450 held-out images")
    for heading in (
        "weights",
        "bits each",
        "KiB",
        "accuracy",
        "seconds",
        ".aimodel KiB",
        ".mlpackage KiB",
        "Core AI diff",
        "Core ML diff",
    ):
        table.add_column(heading, justify="right")
    # the uncompressed model goes the same way, for comparison
    rows = [("float32", None), ("4-bit", 4), ("2-bit", 2)]
    for name, bits in rows:
        started = time.perf_counter()
        if bits is None:
            program = graphopt.capture(model, example)
            scored, size, per_weight = model, 4 * weights, 32.0
        else:
            spec = PalettizationSpec(n_bits=bits)
            config = KMeansPalettizerConfig(
                global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
            )
            palettizer = KMeansPalettizer(model, config)
            scored = palettizer.prepare(example)
            program = palettizer.program()
            summary = palettizer.summary()
            size, per_weight = summary.stored_bytes, summary.bits_per_weight
        seconds = time.perf_counter() - started

        ai = graphopt.lower(program, graphopt.ExportBackend.CoreAI)
        ai.save(args.out / f"digits-{name}.aimodel", overwrite=True)
        ml = graphopt.lower(program, graphopt.ExportBackend.CoreML, precision="float32")
        ml.save(args.out / f"digits-{name}.mlpackage", overwrite=True)
        table.add_row(
            name,
            f"{per_weight:.3f}",
            f"{size / 1024:.1f}",
            f"{100 * accuracy(scored, test_data):.2f} %",
            f"{seconds:.2f}",
            f"{ai.size / 1024:.1f}",
            f"{ml.size / 1024:.1f}",
            f"{ai.verify().max_error:.1e}",
            f"{ml.verify().max_error:.1e}",
        )
    console.print(table)
    console.print(palettizer.summary())
    console.print("diff: largest difference to PyTorch, relative to the largest output")
    console.print(f"artifacts are in {args.out}")


if __name__ == "__main__":
    main()
