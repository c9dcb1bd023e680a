"""low_memory.py [GIB]: time and peak memory of `graphopt compress --low-memory` on an fp16 model on disk.

The model is a chain of 4096 × 4096 linear layers with random weights. It is written in a process of its
own; the one that is measured sees the file alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZE = 4096
CONFIG = "global_config:\n  op_state_spec:\n    weight: {n_bits: 4}\n"


def make(folder: Path, layers: int) -> None:
    """Write the model, with no more than a layer in memory."""
    import torch
    from torch import nn

    from graphopt.ir.mapped import moved_to, release

    (folder / "weights").mkdir()
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(SIZE, SIZE, bias=False) for _ in range(layers)]).half()
    for layer in model:
        weight = torch.randn(SIZE, SIZE, generator=generator).mul_(SIZE**-0.5).half()
        weight = moved_to(folder / "weights", weight)
        release(weight)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    example = (torch.zeros(2, SIZE, dtype=torch.float16),)
    torch.export.save(torch.export.export(model.eval(), example, strict=False), folder / "m.pt2")


def main() -> None:
    """Print one line for a model of that size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gib", type=float, nargs="?", default=1.0)
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(Path(given.make[0]), int(given.make[1]))
        return
    layers = max(1, round(given.gib * 2**30 / (2 * SIZE * SIZE)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, "--make", name, str(layers)], check=True)
        for weight in (folder / "weights").iterdir():
            weight.unlink()
        (folder / "c.yaml").write_text(CONFIG)
        words = ["compress", "m.pt2", "--config", "c.yaml", "-o", "out.pt2", "--low-memory"]
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("graphopt")), *words],
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"graphopt compress failed with {process.returncode}")
        size, out = ((folder / file).stat().st_size / 2**30 for file in ("m.pt2", "out.pt2"))
        print(
            f"model_gib={size:.2f} output_gib={out:.2f} peak_gib={used.ru_maxrss / 2**20:.2f}"
            f" cpu={used.ru_utime + used.ru_stime:.1f} wall={time.perf_counter() - started:.1f}"
        )


if __name__ == "__main__":
    main()
