"""Forms of lookup tables in .pte files: size, memory and time of each, in one run.

    python tests/benchmarks/tables_in_pte.py

4-bit tables of int8 entries, activations float and int8; a linear stack, a small convolutional
network and an embedding with a head. Times are the least of several runs on one thread.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphopt
from graphopt.backends.quiet import silent


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 64)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU())
                for a, b in itertools.pairwise(widths)
            )
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20_000, 256)
        self.head = nn.Linear(256, 256)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


NETS: dict[str, tuple[nn.Module, Tensor]] = {
    "3 linear layers 512×512": (
        nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(3))),
        torch.randn(1, 512),
    ),
    "3 convolutions, 16×16": (Convolutions(), torch.randn(1, 3, 16, 16)),
    "embedding 20,000×256": (Words(), torch.randint(0, 20_000, (1, 16))),
}
TABLES = {
    "global_config": {"op_state_spec": {"weight": {"n_bits": 4, "lut_qspec": {"dtype": "int8"}}}}
}


def seconds(path: Path, x: Tensor) -> float:
    from executorch.runtime import Runtime

    with silent():
        method = Runtime.get().load_program(str(path)).load_method("forward")
        best = float("inf")
        until = time.perf_counter() + 1
        while time.perf_counter() < until:
            started = time.perf_counter()
            method.execute([x])
            best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    table = Table(title="forms of tables in .pte files")
    for heading in (
        "network",
        "activations",
        "delegate",
        "tables",
        "KiB",
        "planned KiB",
        "ms",
        "max error",
    ):
        table.add_column(
            heading, justify="right" if heading in ("KiB", "planned KiB", "ms") else "left"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, (model, x) in NETS.items():
            model = model.eval()
            for activations in ("float", "int8"):
                config: dict[str, Any] = {"palettization": TABLES}
                if activations == "int8":
                    config["quantization"] = {}
                program = graphopt.compress(
                    model,
                    (x,),
                    config,
                    calibration_data=[x],
                    backend="executorch",
                    correct_statistics=False,
                )
                for delegate in ("xnnpack", "portable"):
                    for form in ("dense", "int8", "compressed"):
                        artifact: Any = graphopt.lower(
                            program, "executorch", delegate=delegate, tables=form
                        )
                        path = artifact.save(Path(folder) / "net.pte", overwrite=True)
                        table.add_row(
                            name,
                            activations,
                            delegate,
                            form,
                            f"{artifact.size / 1024:,.0f}",
                            f"{artifact.planned_memory / 1024:,.0f}",
                            f"{1e3 * seconds(path, x):.3f}",
                            f"{artifact.verify().max_error:.1e}",
                        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
