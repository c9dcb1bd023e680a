"""deep_models.py [--width N] [--layers N ...]: time and memory of error feedback by depth.

Every row is a process of its own: integers (W4) for a decoder-like net of random weights, calibrated on random
inputs. Memory is the peak above what the process held before, calibration inputs included.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CALLS, SAMPLES, POSITIONS = 8, 8, 128


def resident(key: str) -> float:
    """MiB of the process that the system counts under a name."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure(layers: int, width: int, limit: str | None, workers: int) -> None:
    """Print CPU and wall seconds and MiB of one fit."""
    import torch
    from torch import Tensor, nn

    import graphopt
    from graphopt.quantization import QuantizerConfig

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = ("query", "key", "value", "out")
            for name in names:
                self.add_module(name, nn.Linear(width, width))
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
            self.gate, self.up = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
            self.down = nn.Linear(3 * width, width)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norms[0](x)
            mixed = nn.functional.scaled_dot_product_attention(
                self.query(y), self.key(y), self.value(y), is_causal=True
            )
            x = x + self.out(mixed)
            y = self.norms[1](x)
            return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(layers))).eval()
    data = [torch.randn(SAMPLES, POSITIONS, width) for _ in range(CALLS)]
    program = graphopt.capture(model, (data[0],))
    config = QuantizerConfig.presets.w4()
    # compiled code and imports are not what is measured
    small = graphopt.capture(nn.Sequential(nn.Linear(8, 8)), (torch.randn(4, 8),))
    graphopt.compress(small, None, config, calibration_data=[torch.randn(4, 8)], progress=False)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    started, used = time.perf_counter(), time.process_time()
    options = {"activation_memory": limit, "progress": False}
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            graphopt.compress(
                program, None, config, calibration_data=data, executor=pool, **options
            )
    else:
        graphopt.compress(program, None, config, calibration_data=data, **options)
    spent = time.process_time() - used, time.perf_counter() - started
    print(f"{spent[0]:.2f} {spent[1]:.2f} {resident('VmHWM') - before:.0f}")


def main() -> None:
    """Print a row for every depth, with activations in memory and in files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, nargs="*", default=[6, 12, 24])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        depth, limit, workers = given.one
        measure(int(depth), given.width, None if limit == "-" else limit, int(workers))
        return
    print("layers  activations  workers  CPU s   wall s  MiB above the model and the data")
    for depth in given.layers:
        for limit, workers in (("-", "1"), ("1MB", "1"), ("-", "2")):
            one = ["--one", str(depth), limit, workers, "--width", str(given.width)]
            done = subprocess.run(
                [sys.executable, __file__, *one], check=True, capture_output=True, text=True
            )
            row = "  ".join(done.stdout.split())
            print(
                f"{depth:6}  {'memory' if limit == '-' else 'files':11}  {workers:7}  {row}",
                flush=True,
            )


if __name__ == "__main__":
    main()
