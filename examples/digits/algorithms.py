"""K-means, sensitive k-means, output feedback and differentiable k-means side by side.

python examples/digits/algorithms.py --out out/algorithms

Accuracy is that of the saved Core AI artifacts, which are run; the ratio is the fp16 Core ML package
over the compressed one. Methods that train are run three times with other orders of the data.
"SKM, labels" shows what gradients are worth of a network that has learnt its labels by heart: they
vanish where it is sure. Without labels they are those of the network's own predictions.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from model import DigitsNet, Split, accuracy, load, train
from rich.console import Console
from rich.table import Table
from torch import nn

import graphopt
from graphopt.backends.coreai.backend import run_asset
from graphopt.palettization import (
    DKMPalettizer,
    DKMPalettizerConfig,
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleDKMPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.config import PATSchedule
from graphopt.passes import ReestimateBatchNorm

CALIBRATION = 512  # images; labels are used by "SKM, labels" alone


def batches(data: Split, size: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images, labels = data[0][:CALIBRATION], data[1][:CALIBRATION]
    return list(zip(images.split(size), labels.split(size), strict=True))


def calibrated(
    model: nn.Module, bits: int, data: Split, algorithm: str
) -> tuple[KMeansPalettizer, nn.Module]:
    spec = PalettizationSpec(n_bits=bits, algorithm=algorithm.partition(",")[0])
    config = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    palettizer = KMeansPalettizer(model, KMeansPalettizerConfig(global_config=config))
    prepared = palettizer.prepare((data[0][:1],))
    if algorithm == "skm, labels":
        with palettizer.calibration_mode(loss_fn=F.cross_entropy) as calibration:
            for x, y in batches(data):
                calibration.step(prepared(x), y)
    elif algorithm in ("skm, no labels", "gptq"):
        palettizer.calibrate([x for x, _ in batches(data)], label_free="kl")
    return palettizer, prepared


def learned(model: nn.Module, bits: int, data: Split, epochs: int, seed: int) -> DKMPalettizer:
    spec = PalettizationSpec(n_bits=bits)
    steps = epochs * -(-len(data[1]) // 64)
    config = ModuleDKMPalettizerConfig(
        op_state_spec={"weight": spec}, pat_schedule=PATSchedule(freeze_codes=2 * steps // 3)
    )
    palettizer = DKMPalettizer(model, DKMPalettizerConfig(global_config=config))
    prepared = palettizer.prepare((data[0][:1],))
    optimizer = torch.optim.Adam(prepared.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(seed)
    with palettizer.training_mode():
        for _ in range(epochs):
            for batch in torch.randperm(len(data[1])).split(64):
                optimizer.zero_grad()
                F.cross_entropy(prepared(data[0][batch]), data[1][batch]).backward()
                optimizer.step()
                schedule.step()
                palettizer.step()
    return palettizer


def methods(
    model: DigitsNet, bits: int, data: Split, epochs: int, trials: int
) -> Iterator[tuple[str, list[graphopt.Program]]]:
    exact = graphopt.capture(model, (data[0][:1],)).graph_module
    plain = calibrated(model, bits, data, "kmeans")[0].program()
    yield "k-means", [plain]
    norms = plain.copy()
    ReestimateBatchNorm([x for x, _ in batches(data)], exact)(norms.graph_module)
    yield "k-means, norms re-estimated", [norms]
    for kind in ("labels", "no labels"):
        yield f"SKM, {kind}", [calibrated(model, bits, data, f"skm, {kind}")[0].program()]
    yield "output feedback", [calibrated(model, bits, data, "gptq")[0].program()]
    yield "DKM", [learned(model, bits, data, epochs, seed).program() for seed in range(trials)]


def measured(program: graphopt.Program, data: Split, path: Path) -> tuple[float, int]:
    """Accuracy of the Core AI artifact and size of the fp16 Core ML package."""
    whole = program.with_example((data[0],))
    graphopt.lower(whole, "coreai").save(path.with_suffix(".aimodel"), overwrite=True)
    (name,) = (node.name for node in whole.graph_module.graph.find_nodes(op="placeholder"))
    logits = run_asset(path.with_suffix(".aimodel"), {name: data[0]})[0]
    package = graphopt.lower(program, "coreml")
    package.save(path.with_suffix(".mlpackage"), overwrite=True)
    return float((logits.argmax(1) == data[1]).float().mean()), package.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/algorithms"))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2, 1])
    parser.add_argument("--epochs", type=int, default=12, help="epochs of DKM")
    parser.add_argument("--trials", type=int, default=3)
    args = parser.parse_args()
    console = Console(width=110)
    warnings.simplefilter("ignore", FutureWarning)

    train_data, test_data = load()
    model = train(train_data)
    dense = graphopt.capture(model, (test_data[0][:1],))
    _, full = measured(dense, test_data, args.out / "float")
    console.print(f"float: {100 * accuracy(model, test_data):.2f} %, fp16 package {full} bytes")
    table = Table(title="digits CNN, one table per weight, 450 held-out images")
    for heading in ("bits", "method", "ratio", "accuracy"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for bits in args.bits:
        for name, programs in methods(model, bits, train_data, args.epochs, args.trials):
            path = args.out / f"{name.replace(' ', '-').replace(',', '')}-{bits}"
            found = [measured(program, test_data, path) for program in programs]
            scores = [100 * score for score, _ in found]
            spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            table.add_row(
                str(bits),
                name,
                f"{full / found[0][1]:.2f}",
                f"{statistics.mean(scores):.2f}{spread} %",
            )
    console.print(table)


if __name__ == "__main__":
    main()
