"""Weights of a built Core ML model: our clustering against coremltools' own, in one run.

    python tests/benchmarks/coreml_weights.py

4.1 million random weights in five layers, converted for iOS 18 in float16. Times are those of the
whole call, the better of two; squared errors are of the weights read back from what was saved.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from graphopt import coreml_utils
from graphopt.backends.coreml.evaluate import dense_value, load_program
from graphopt.backends.quiet import silent
from graphopt.specs import (
    PalettizationSpec,
    PerBlockGranularity,
    PerChannelGranularity,
    PerGroupedChannelGranularity,
    QuantizationSpec,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(256, 512, 3, padding=1)
        self.words = nn.Embedding(4096, 256)
        self.first = nn.Linear(512, 1024)
        self.second = nn.Linear(1024, 1024)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.second(torch.relu(self.first(self.conv(x).mean((2, 3))))), self.words(ids)


def built() -> Any:
    import coremltools as ct

    torch.manual_seed(0)
    inputs = (torch.randn(1, 256, 8, 8), torch.zeros(4, dtype=torch.int32))
    exported = torch.export.export(Net().eval(), inputs).run_decompositions({})
    return ct.convert(exported, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)


def weights(path: Path) -> dict[str, Any]:
    found = {}
    for op in load_program(path).functions["main"].operations:
        for slot in ("weight", "x"):
            var = op.inputs.get(slot) if op.op_type in ("conv", "linear", "gather") else None
            if var is not None and var.op is not None and var.op.op_type.startswith("const"):
                found[op.name] = np.asarray(dense_value(var), dtype=np.float64)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    from coremltools.optimize import coreml as cto

    def theirs(config: Any, call: Any) -> Callable[[Any], Any]:
        return lambda model: call(model, cto.OptimizationConfig(config))

    jobs: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
        "4-bit tables": (
            lambda model: coreml_utils.palettize_weights(model),
            theirs(cto.OpPalettizerConfig(nbits=4), cto.palettize_weights),
        ),
        "4-bit tables per 16 channels": (
            lambda model: coreml_utils.palettize_weights(
                model, PalettizationSpec(granularity=PerGroupedChannelGranularity(group_size=16))
            ),
            theirs(
                cto.OpPalettizerConfig(nbits=4, granularity="per_grouped_channel", group_size=16),
                cto.palettize_weights,
            ),
        ),
        "4-bit tables and channel scales": (
            lambda model: coreml_utils.palettize_weights(
                model, PalettizationSpec(enable_per_channel_scale=True)
            ),
            theirs(
                cto.OpPalettizerConfig(nbits=4, enable_per_channel_scale=True),
                cto.palettize_weights,
            ),
        ),
        "int8 per channel": (
            lambda model: coreml_utils.quantize_weights(
                model, QuantizationSpec(granularity=PerChannelGranularity())
            ),
            theirs(cto.OpLinearQuantizerConfig(), cto.linear_quantize_weights),
        ),
        "int4 per block of 16": (
            lambda model: coreml_utils.quantize_weights(
                model,
                QuantizationSpec(dtype=torch.int4, granularity=PerBlockGranularity(block_size=16)),
            ),
            theirs(
                cto.OpLinearQuantizerConfig(dtype="int4", granularity="per_block", block_size=16),
                cto.linear_quantize_weights,
            ),
        ),
    }
    table = Table(title="weights of a built Core ML model: ours / coremltools")
    for heading in ("form", "squared error", "ratio", "seconds", "ratio", "KiB"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "net.mlpackage"
        with silent():
            model = built()
            model.save(str(source))
            exact = weights(source)
        for name, both in jobs.items():
            errors, times, sizes = [], [], []
            for place, job in enumerate(both):
                path, best = Path(folder) / f"{place}.mlpackage", float("inf")
                with silent():
                    for _ in range(2):
                        started = time.perf_counter()
                        small = job(model)
                        best = min(best, time.perf_counter() - started)
                    small.save(str(path))
                    found = weights(path)
                errors.append(sum(float(((found[k] - exact[k]) ** 2).sum()) for k in exact))
                times.append(best)
                sizes.append(sum(file.stat().st_size for file in path.rglob("weight.bin")) / 1024)
            table.add_row(
                name,
                f"{errors[0]:,.1f} / {errors[1]:,.1f}",
                f"{errors[0] / errors[1]:.4f}",
                f"{times[0]:.2f} / {times[1]:.2f}",
                f"{times[0] / times[1]:.2f}",
                f"{sizes[0]:,.0f} / {sizes[1]:,.0f}",
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
