"""Train, compress in four forms, write ONNX files, run them in ONNX Runtime, print a table.

python examples/onnx_runtime/run.py --out out/onnx_runtime
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

from classify import digits, named, session_of
from model import train
from rich.console import Console
from rich.table import Table

import graphopt
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.quantization import QuantizerConfig

# name, config, options of lowering
FORMS: list[tuple[str, Any, dict[str, Any]]] = [
    ("float32", None, {}),
    ("W8A8", QuantizerConfig.presets.w8a8_affine(), {}),
    ("int8 weights", QuantizerConfig.presets.w8(), {}),
    ("4-bit tables", KMeansPalettizerConfig.presets.w4(), {}),
    ("int4 blocks", QuantizerConfig.presets.w4_per_block(block_size=32), {"matmul": "nbits"}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/onnx_runtime"))
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    console = Console(width=100)
    warnings.simplefilter("ignore")

    started = time.perf_counter()
    model, known = train(args.epochs)
    console.print(f"trained in {time.perf_counter() - started:.1f} s")
    example = (known[:2],)
    calibration = [(part,) for part in known[:256].split(32)]
    images, labels = digits(held_out=True)

    table = Table(title=f"{len(labels)} held-out digits in ONNX Runtime, one thread")
    for heading in ("form", "KiB", "accuracy", "as PyTorch", "difference", "ms for 64"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for name, config, options in FORMS:
        if config is None:
            program = graphopt.capture(model, example)
        else:
            program = graphopt.compress(model, example, config, calibration, progress=False)
        artifact = graphopt.lower(program, "onnx", **options)
        path = artifact.save(args.out / f"digits-{name.replace(' ', '-')}.onnx", overwrite=True)
        session = session_of(str(path))
        found = named(session, images)
        wanted = program.module()(known.new_tensor(images)).argmax(-1).numpy()
        times = []
        for _ in range(20):
            begun = time.perf_counter()
            named(session, images[:64])
            times.append(1e3 * (time.perf_counter() - begun))
        table.add_row(
            name,
            f"{artifact.size / 1024:.1f}",
            f"{(found == labels).mean():.2%}",
            f"{(found == wanted).sum()} of {len(labels)}",
            f"{artifact.verification.max_error:.1e}",
            f"{statistics.median(times):.2f}",
        )
    console.print(table)
    console.print("difference: the largest to PyTorch, relative to the largest output")
    console.print(f"files are in {args.out}")


if __name__ == "__main__":
    main()
