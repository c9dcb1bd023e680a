"""Rate-distortion optimisation: what each stage is worth, against uniform quantization.

    make bench-rdo

Several ResNet-18 of width 16 are trained on digits. Each row of the ablation switches one stage off,
at one target of bits; the rows "integers" and "palettes" have all stages. Figures are means over the
networks with the spread of a single one: KL divergence of the outputs on held-out images (the column
to read: one image is 0.17 points), points of accuracy lost, seconds of `optimize`. "published" is the
published setting, 4.19 bits from 4, 6 and 8.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "examples" / "resnet18_rdo"))
WIDE = [2, 3, 4, 6, 8]
ABLATION: dict[str, dict[str, Any]] = {
    "integers, all stages": {},
    "bits: all alike (no allocation)": {"candidates": None},
    "no second allocation from blocks": {"blocks": {"choose": False}},
    "no scale search": {"blocks": {"scales": False}},
    "no error feedback": {"feedback": {"enabled": False}},
    "no compensation, no bias correction": {"feedback": {"compensate": False}},
    "neither feedback nor compensation": {"feedback": {"enabled": False, "compensate": False}},
    "no adaptive rounding": {"rounding": {"blocks": "none"}},
    "adaptive rounding of all blocks": {"rounding": {"blocks": "all"}},
    "all blocks, Fisher per element": {"rounding": {"blocks": "all", "weighting": "fisher"}},
    "all blocks, errors unweighted": {"rounding": {"blocks": "all", "weighting": "none"}},
    "all blocks, scales not trained": {"rounding": {"blocks": "all", "scales": False}},
    "rounding, but no feedback": {
        "feedback": {"enabled": False},
        "rounding": {"blocks": "all"},
    },
    "palettes, all stages": {"family": "palette"},
    "palettes, no adaptive rounding": {"family": "palette", "rounding": {"blocks": "none"}},
    "palettes, no error feedback": {"family": "palette", "feedback": {"enabled": False}},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "weights": {},
    "weights and int8 activations": {"activations": "int8"},
    "the same, QDrop off": {"activations": "int8", "rounding": {"drop": 0.0}},
    "entropy-coded 8-bit weights": {"candidates": [8], "rate": "entropy"},
}


def networks(count: int, folder: Path) -> list[tuple[torch.nn.Module, Any, Any]]:
    from model import digits, trained

    known, held = digits()
    return [
        (trained(folder / f"{seed}.pt", known, 16, 12, seed, False), known, held)
        for seed in range(42, 42 + count)
    ]


def run(config: dict[str, Any], nets: list[Any]) -> tuple[Any, list[float]]:
    """Comparisons and seconds for every network."""
    from graphopt import rdo

    rows, seconds = [], []
    for model, (images, _), (x, y) in nets:
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(42))
        calibration = list(images[drawn[:512]].split(32))
        started = time.perf_counter()
        done = rdo.optimize(
            model,
            (x[:1],),
            calibration,
            config,
            evaluation_data=[x],
            progress=False,
            evaluate=lambda module, x=x, y=y: 100.0 * (module(x).argmax(1) == y),
        )
        seconds.append(time.perf_counter() - started)
        rows.append(done.report)
    return rows, seconds


def show(
    title: str,
    target: float,
    cases: dict[str, dict[str, Any]],
    nets: list[Any],
    candidates: list[int],
) -> None:
    table = Table(title=f"{title}, target {target:g} bits, {len(nets)} networks")
    for heading in ("", "bits", "coded", "KL ×1e-6", "drop, points", "s"):
        table.add_column(heading, justify="left" if not heading else "right")

    def add(name: str, reports: list[Any], row: str, seconds: list[float] | None) -> None:
        found = [report[row] for report in reports]
        distance = [1e6 * each.distance for each in found]
        drops = [each.drop for each in found]
        ours = row == "rate-distortion"
        coded = np.mean([report.coded_bits_per_weight for report in reports])
        table.add_row(
            name,
            f"{np.mean([each.bits_per_weight for each in found]):.3f}",
            f"{coded:.3f}" if ours else "",
            f"{np.mean(distance):.1f} ± {np.std(distance):.1f}",
            f"{np.mean(drops):.2f} ± {np.std(drops):.2f}",
            "" if seconds is None else f"{np.mean(seconds):.0f}",
        )

    for number, (name, change) in enumerate(cases.items()):
        config = {"target_bits": target, "candidates": candidates, **change}
        if config["candidates"] is None:
            # the widest single width below the target
            config["candidates"] = [max(bits for bits in candidates if bits + 0.1 <= target)]
        reports, seconds = run(config, nets)
        if not number:
            add("uniform 8-bit, nearest", reports, "uniform 8-bit", None)
            add("uniform 4-bit, nearest", reports, "uniform 4-bit", None)
        add(name, reports, "rate-distortion", seconds)
        Console(stderr=True).print(f"{name}: {seconds}")
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=["ablation", "published"])
    parser.add_argument("--networks", type=int, default=3)
    parser.add_argument("--target", type=float, default=2.3)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench-rdo")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    nets = networks(args.networks, args.out)
    if "ablation" in args.parts:
        show("ablation", args.target, ABLATION, nets, WIDE)
    if "published" in args.parts:
        show("published setting", 4.19, PUBLISHED, nets, [4, 6, 8])


if __name__ == "__main__":
    main()
