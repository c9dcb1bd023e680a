from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def run(*words: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.coreai
@pytest.mark.coreml
def test_digits_example_trains_palettizes_and_runs(tmp_path: Path) -> None:
    out = run(str(ROOT / "examples/digits/run.py"), "--out", str(tmp_path), cwd=tmp_path)
    rows = {line.split("│")[1].strip(): line.split("│") for line in out.splitlines() if "│" in line}
    for name in ("float32", "4-bit", "2-bit"):
        accuracy = float(rows[name][4].strip(" %"))
        assert accuracy > 97.0
        assert float(rows[name][8]) < 1e-5  # Core AI against PyTorch
        assert float(rows[name][9]) < 1e-5  # Core ML against PyTorch
        assert (tmp_path / f"digits-{name}.aimodel").exists()
        assert (tmp_path / f"digits-{name}.mlpackage").exists()
    assert float(rows["2-bit"][2]) < float(rows["4-bit"][2]) < 4.1


@pytest.mark.coreai
def test_mnist_example_reads_idx_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 256), ("t10k", 64)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        head = bytes([0, 0, 8, 3]) + np.array(images.shape, dtype=">u4").tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = bytes([0, 0, 8, 1]) + np.array(labels.shape, dtype=">u4").tobytes()
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    out = run(
        str(ROOT / "examples/mnist/run.py"), "--mnist", str(tmp_path), "--epochs", "1",
        "--out", str(tmp_path / "out"), cwd=tmp_path,
    )  # fmt: skip
    assert "4-bit, groups of 2:" in out
    assert (tmp_path / "out" / "2-bit.aimodel").exists()
