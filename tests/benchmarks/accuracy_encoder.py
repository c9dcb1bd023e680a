"""Ablation of what moves the accuracy of quantized activations and of tables, on a pretrained encoder.

python tests/benchmarks/accuracy_encoder.py
python tests/benchmarks/accuracy_encoder.py --presets --tables w3_vectors:384

One row per setting, calibrated on calibration.txt and compared with the float model on evaluation.txt:
PSNR with the peak of each batch, averaged over batches, mean cosine similarity, and CPU seconds.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphopt
from graphopt.config.base import ANY
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.quantization import OpQuantizerConfig, QuantizerConfig
from graphopt.run.synthetic_data import synthetic_calls

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "sentence_encoder"))
from model import Batch, batches, encoded, load

Change = Callable[[QuantizerConfig], None]
# preset and number of sentences; "template" is 128 from one template
TABLES = (
    "w4:384",
    "w4_vectors:384",
    "w3_vectors:384",
    "w2_vectors:384",
    "w2_vectors:1536",
    "w4_vectors:template",
    "w3_vectors:template",
    "w2_vectors:template",
)
_NOUNS = [
    "cat",
    "dog",
    "house",
    "tree",
    "river",
    "mountain",
    "book",
    "car",
    "city",
    "garden",
    "train",
    "computer",
]
_KINDS = [
    "red",
    "blue",
    "old",
    "new",
    "big",
    "small",
    "fast",
    "slow",
    "bright",
    "dark",
    "quiet",
    "strange",
]


def scores(module: nn.Module, data: list[Batch], wanted: list[Tensor]) -> tuple[float, float]:
    """Mean PSNR in dB and mean cosine similarity."""
    decibels, cosines = [], []
    with torch.no_grad():
        for batch, want in zip(data, wanted, strict=True):
            got = module(*batch)
            error = float((got - want).square().mean())
            decibels.append(10 * math.log10(float(want.abs().max()) ** 2 / error))
            cosines.append(F.cosine_similarity(got, want))
    return sum(decibels) / len(decibels), float(torch.cat(cosines).mean())


def _without_migration(config: QuantizerConfig) -> None:
    config.migrate_scales = False


def _nearest(config: QuantizerConfig) -> None:
    module = config.global_config
    assert module is not None
    module.op_state_spec = {
        name: None if spec is None else spec.model_copy(update={"algorithm": "nearest"})
        for name, spec in module.op_state_spec.items()
    }


def _both(config: QuantizerConfig) -> None:
    _without_migration(config)
    _nearest(config)


def _sums_rounded(config: QuantizerConfig) -> None:
    """Name the sums and linear layers, so that residual sums are rounded in front of norms, too."""
    _both(config)
    module = config.global_config
    assert module is not None
    slots = {
        "op_input_spec": {ANY: module.op_input_spec[ANY]},
        "op_output_spec": {ANY: module.op_output_spec[ANY]},
        "op_state_spec": dict(module.op_state_spec),
    }
    named = OpQuantizerConfig(**slots)
    module.op_type_config = {"add": named, "linear": named}


ROWS: tuple[tuple[str, Change], ...] = (
    ("everything rounded, also in front of norms", _sums_rounded),
    ("placement alone", _both),
    ("placement and migration", _nearest),
    ("placement and error feedback", _without_migration),
    ("all: the default", lambda config: None),
)


def from_template(count: int = 128) -> list[Batch]:
    """Sentences of one form, with a few dozen distinct words among them."""
    lines = [
        f"The {_KINDS[n % 12]} {_NOUNS[n // 12 % 12]} is in the {_NOUNS[(7 * n + 3) % 12]}."
        for n in range(count)
    ]
    return encoded(lines)


def tables(
    model: nn.Module, evaluation: list[Batch], wanted: list[Tensor], rows: list[str]
) -> Table:
    """Presets of tables: bits over all that is stored, and over the compressed tensors."""
    program = graphopt.capture(model, evaluation[-1])
    table = Table(title="tables by error feedback, embeddings included")
    for heading in ("preset", "sentences", "bits, all", "compressed", "PSNR dB", "cosine", "CPU s"):
        table.add_column(heading)
    for row in rows:
        preset, _, count = row.partition(":")
        plain = count == "template"
        data = from_template() if plain else batches("calibration", limit=int(count))
        config = getattr(KMeansPalettizerConfig.presets, preset)()
        started = time.process_time()
        made = graphopt.compress(program, None, config, data)
        seconds = time.process_time() - started
        psnr, cosine = scores(made.module(), evaluation, wanted)
        report = made.report()
        bits = f"{report.overall_bits_per_weight:.3f}", f"{report.bits_per_weight:.3f}"
        table.add_row(preset, count, *bits, f"{psnr:.2f}", f"{cosine:.4f}", f"{seconds:.0f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=384)
    parser.add_argument("--presets", nargs="*", default=["w8a8_affine", "w4a8"])
    parser.add_argument("--tables", nargs="*", default=list(TABLES), help="preset:sentences")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model, calibration = load(), batches("calibration", limit=args.sentences)
    evaluation = batches("evaluation")
    with torch.no_grad():
        wanted = [model(*batch) for batch in evaluation]
    program = graphopt.capture(model, calibration[-1])
    table = Table(title=f"{args.sentences} sentences, the encoder's embeddings against float")
    for heading in ("preset", "what", "PSNR dB", "cosine", "CPU s"):
        table.add_column(heading)
    for preset in args.presets:
        cases = [(name, change, calibration) for name, change in ROWS]
        cases.append(("the default, random tokens", ROWS[-1][1], synthetic_calls(program)))
        for name, change, data in cases:
            config = getattr(QuantizerConfig.presets, preset)()
            change(config)
            started = time.process_time()
            made = graphopt.compress(program, None, config, data)
            seconds = time.process_time() - started
            psnr, cosine = scores(made.module(), evaluation, wanted)
            table.add_row(preset, name, f"{psnr:.2f}", f"{cosine:.4f}", f"{seconds:.0f}")
    if args.presets:
        Console(width=110).print(table)
    if args.tables:
        Console(width=110).print(tables(model, evaluation, wanted, args.tables))


if __name__ == "__main__":
    main()
