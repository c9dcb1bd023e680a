"""Sensitive and differentiable k-means against coreai-opt 0.3.0 and coremltools, same model and data.

    make bench-peer           # once, for coreai-opt; without it its rows are left out
    make bench-calibrated

A residual network trained on scikit-learn's digits at 16×16 is palettized per tensor; every job runs
in a process of its own, which trains nothing but what it measures. Reported are top-1 on 450 held-out
images and the KL divergence to the float model's outputs, both as means over networks of several seeds
(with the standard deviation of top-1: one image is 0.22 points), seconds of the algorithm alone (after a first
use on another model, so that compiling is left out on all sides) and the peak of resident memory above
that before the algorithm. "step" trains one 1024×4096 linear layer at 3 bits, "vectors" clusters a
512×512 weight into 256 entries of 4.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from calibrated_methods import BATCH, JOBS, Net, linear_step, timed, vectors
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent.parent
PEER = ROOT / ".venv-peer" / "bin" / "python"


def prepare(folder: Path, seed: int) -> None:
    """Train the network and keep it with its data."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(16, 16), mode="bilinear")
    labels = torch.tensor(digits.target)
    held = torch.arange(len(labels)) % 4 == 0
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    x, y = images[~held], labels[~held]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, epochs=16, steps_per_epoch=-(-len(y) // BATCH)
    )
    for _ in range(16):
        for batch in torch.randperm(len(y)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    torch.save(
        {"state": model.state_dict(), "train": (x, y), "test": (images[held], labels[held])},
        folder / "net.pt",
    )


def measured(model: nn.Module, exact: nn.Module, test: tuple[Tensor, Tensor]) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        found, wanted = model(test[0]), exact(test[0])
    kl = F.kl_div(
        found.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True
    )
    return {"top1": 100 * float((found.argmax(1) == test[1]).float().mean()), "kl": float(kl)}


# --- jobs: each returns (palettized module, seconds of the algorithm, MiB) ------------------------


def run_job(name: str, bits: int, folder: Path) -> dict[str, float]:
    if name.startswith("step:"):
        return linear_step(name.removeprefix("step:"))
    if name.startswith("vectors:"):
        return vectors(name.removeprefix("vectors:"))
    stored = torch.load(folder / "net.pt", weights_only=True)
    exact = Net().eval()
    exact.load_state_dict(stored["state"])
    small = (stored["train"][0][:BATCH], stored["train"][1][:BATCH])
    warm = Net().eval()
    if "DKM" in name:
        JOBS[name](warm, small, bits, 1)()
    else:
        JOBS[name](warm, small, bits)()
    model = Net().eval()
    model.load_state_dict(stored["state"])
    module, seconds, mib = timed(JOBS[name](model, stored["train"], bits))
    return {**measured(module, exact, stored["test"]), "seconds": seconds, "mib": mib}


def mean_over(jobs: list[dict[str, float]]) -> dict[str, float]:
    """Means of every figure, and the standard deviation of top-1."""
    found = {key: statistics.mean(job[key] for job in jobs) for key in jobs[0]}
    return {**found, "spread": statistics.pstdev(job["top1"] for job in jobs)}


def launch(name: str, bits: int, folder: Path) -> dict[str, float] | None:
    peer = "coreai-opt" in name
    if peer and not PEER.exists():
        return None
    python = str(PEER) if peer else sys.executable
    done = subprocess.run(
        [
            python,
            "-W",
            "ignore",
            __file__,
            "--job",
            name,
            "--bits",
            str(bits),
            "--folder",
            str(folder),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(f"{name}: failed\n{done.stderr[-2000:]}")
        return None
    found: dict[str, float] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--nets", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["methods", "step", "vectors"])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.job:
        print(json.dumps(run_job(args.job, args.bits[0], args.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "methods" in args.parts:
            folders = [folder / str(seed) for seed in range(args.nets)]
            for seed, each in enumerate(folders):
                each.mkdir()
                prepare(each, seed)
            print(f"{'bits':>4}  {'method':<28}{'top-1':>14}{'KL':>10}{'seconds':>10}{'MiB':>8}")
            for bits in args.bits:
                for job in JOBS:
                    runs = [launch(job, bits, each) for each in folders]
                    if None in runs:
                        continue
                    found = mean_over([run for run in runs if run is not None])
                    print(
                        f"{bits:>4}  {job:<28}{found['top1']:>8.2f} ±{found['spread']:>4.2f}"
                        f"{found['kl']:>10.4f}{found['seconds']:>10.2f}{found['mib']:>8.0f}",
                        flush=True,
                    )
        if "step" in args.parts:
            for kind in ("uncompressed", "ours", "coremltools"):
                if (found := launch(f"step:{kind}", 3, folder)) is not None:
                    print(
                        f"1024×4096 at 3 bits, {kind:<14}{found['seconds']:>8.3f} s a step"
                        f"{found['mib']:>8.0f} MiB",
                        flush=True,
                    )
        if "vectors" in args.parts:
            for kind in ("ours", "coreai-opt"):
                if (found := launch(f"vectors:{kind}", 8, folder)) is not None:
                    print(
                        f"512×512, 256 entries of 4, {kind:<12}{found['seconds']:>8.2f} s"
                        f"  SSE {found['sse']:.3f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
