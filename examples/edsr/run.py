"""Quantize EDSR without labels: int8, and 4-bit tables of int8 entries with int8 activations.

python examples/edsr/run.py --out out/edsr
python examples/edsr/run.py --resblocks 16 --feats 64 --steps 8000 --b100 path/to/B100
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from model import (
    EDSR,
    HELD_OUT,
    MIDDLE,
    TRAINING,
    bicubic,
    downsample,
    evaluate,
    folder,
    photographs,
    train,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphopt
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.quantization import (
    ModuleQuantizerConfig,
    QuantizationScheme,
    QuantizationSpec,
    Quantizer,
    QuantizerConfig,
)


def quantized(model: nn.Module, config: QuantizerConfig, inputs: list[Tensor]) -> Quantizer:
    quantizer = Quantizer(model, config)
    prepared = quantizer.prepare((inputs[0],))
    with quantizer.calibration_mode():
        for image in inputs:
            prepared(image)
    return quantizer


def joint(model: nn.Module, inputs: list[Tensor]) -> Quantizer:
    """Weights as 4-bit tables of int8 entries, then int8 activations."""
    spec = PalettizationSpec(
        n_bits=4,
        lut_qspec=QuantizationSpec(dtype=torch.int8, qscheme=QuantizationScheme.SYMMETRIC),
    )
    palettizer = KMeansPalettizer(
        model,
        KMeansPalettizerConfig(
            global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
        ),
    )
    palettizer.prepare((inputs[0],))
    palettizer.calibrate(inputs[2::3])  # the smallest of each photograph say enough
    palettized = palettizer.finalize(backend=graphopt.ExportBackend.CoreAI)
    act = QuantizationSpec(dtype=torch.int8, qscheme=QuantizationScheme.SYMMETRIC)
    activations = ModuleQuantizerConfig(
        op_state_spec=None, op_input_spec={"*": act}, op_output_spec={"*": act}
    )
    return quantized(palettized, QuantizerConfig(global_config=activations), inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/edsr"))
    parser.add_argument("--resblocks", type=int, default=8)
    parser.add_argument("--feats", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, help="weights to load instead of training")
    parser.add_argument("--b100", type=Path, help="20 images of it calibrate, 80 evaluate")
    args = parser.parse_args()
    console = Console(width=100)
    warnings.simplefilter("ignore", FutureWarning)
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    model = EDSR(args.resblocks, args.feats).eval()
    if args.weights is not None:
        model.load_state_dict(torch.load(args.weights, weights_only=True))
    else:
        started = time.perf_counter()
        model = train(model, steps=args.steps, seed=args.seed)
        torch.save(model.state_dict(), args.out / "edsr.pt")
        console.print(f"trained in {time.perf_counter() - started:.0f} s")

    if args.b100 is not None:
        images = folder(args.b100)
        calibration, held_out = images[:20], images[20:100]
        inputs = [downsample(image) - MIDDLE for image in calibration]
    else:
        held_out = photographs(HELD_OUT)
        # whole photographs of three sizes, none of those that evaluate
        inputs = [
            downsample(image, 0.5 * size) - MIDDLE
            for image in photographs(TRAINING)
            for size in (1, 0.7, 0.5)
        ]

    base = evaluate(model, held_out)
    weights = sum(p.numel() for p in model.parameters())
    table = Table(title=f"EDSR {args.resblocks}×{args.feats}, {len(held_out)} held-out images")
    for heading in (
        "variant",
        "PSNR dB",
        "loss dB",
        "PSNR to FP32",
        "seconds",
        ".aimodel KiB",
        "Core AI diff",
    ):
        table.add_column(heading, justify="right")
    table.add_row("bicubic", f"{evaluate(bicubic, held_out):.2f}", *[""] * 5)
    table.add_row("FP32", f"{base:.2f}", "", "", "", f"{4 * weights / 1024:.0f} (raw)", "")

    variants = {
        "W_INT8_A_INT8": lambda: quantized(model, QuantizerConfig(), inputs),
        "W_INT8_A_INT8 affine": lambda: quantized(
            model, QuantizerConfig.presets.w8a8_affine(), inputs
        ),
        "W_P4(INT8)_A_INT8": lambda: joint(model, inputs),
    }
    for name, make in variants.items():
        started = time.perf_counter()
        quantizer = make()
        finalized = quantizer.finalize(backend=graphopt.ExportBackend.CoreAI)
        seconds = time.perf_counter() - started
        score = evaluate(finalized, held_out)
        fidelity = evaluate(finalized, held_out, reference=model)
        # the artifact has the shape of one patch, on which it is run and compared
        patch = (inputs[0][..., :48, :48].contiguous(),)
        artifact = graphopt.lower(finalized, graphopt.ExportBackend.CoreAI, patch)
        file = name.replace(" ", "_").replace("(", "_").replace(")", "") + ".aimodel"
        artifact.save(args.out / file, overwrite=True)
        difference = artifact.verify().max_error
        table.add_row(
            name,
            f"{score:.2f}",
            f"{base - score:.3f}",
            f"{fidelity:.1f}",
            f"{seconds:.1f}",
            f"{artifact.size / 1024:.0f}",
            f"{difference:.1e}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
