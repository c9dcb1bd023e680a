from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def run(*words: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
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


@pytest.mark.slow
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
        str(ROOT / "examples/mnist/run.py"),
        "--mnist",
        str(tmp_path),
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "out"),
        cwd=tmp_path,
    )
    assert "4-bit, groups of 2:" in out
    assert (tmp_path / "out" / "2-bit.aimodel").exists()


@pytest.mark.coreai
@pytest.mark.slow
def test_edsr_example_quantizes_and_runs(tmp_path: Path) -> None:
    """A network trained for a moment: enough to see that the workflow holds together."""
    out = run(
        str(ROOT / "examples/edsr/run.py"),
        "--steps",
        "30",
        "--resblocks",
        "2",
        "--feats",
        "8",
        "--out",
        str(tmp_path),
        cwd=tmp_path,
    )
    rows = {line.split("│")[1].strip(): line.split("│") for line in out.splitlines() if "│" in line}
    for name in ("W_INT8_A_INT8", "W_INT8_A_INT8 affine", "W_P4(INT8)_A_INT8"):
        assert float(rows[name][4]) > (25 if "P4" in name else 35)  # PSNR to FP32
        assert float(rows[name][7]) < 0.03  # Core AI against PyTorch: at most a few steps
    assert len(list(tmp_path.glob("*.aimodel"))) == 3


@pytest.mark.slow
def test_edsr_example_reads_a_folder_of_images(tmp_path: Path) -> None:
    import skimage.io

    rng = np.random.default_rng(0)
    folder = tmp_path / "B100"
    folder.mkdir()
    for number in range(22):
        image = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
        skimage.io.imsave(folder / f"{number:03d}.png", image, check_contrast=False)
    out = run(
        str(ROOT / "examples/edsr/run.py"),
        "--steps",
        "1",
        "--resblocks",
        "1",
        "--feats",
        "4",
        "--b100",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        cwd=tmp_path,
    )
    assert "2 held-out images" in out


@pytest.mark.slow
@pytest.mark.coreai
@pytest.mark.coreml
def test_digits_algorithms_keep_accuracy_where_they_have_data(tmp_path: Path) -> None:
    out = run(
        str(ROOT / "examples/digits/algorithms.py"),
        "--bits",
        "2",
        "--epochs",
        "4",
        "--trials",
        "2",
        "--out",
        str(tmp_path),
        cwd=tmp_path,
    )
    rows = [line.split("│") for line in out.splitlines() if "│" in line]
    scores = {row[2].strip(): float(row[4].split()[0]) for row in rows}
    ratios = {row[2].strip(): float(row[3]) for row in rows}
    uncompressed = float(re.search(r"float: ([\d.]+) %", out)[1])  # type: ignore[index]
    for name in ("k-means, norms re-estimated", "SKM, no labels", "output feedback", "DKM"):
        assert scores[name] >= uncompressed - 1.0, name
    assert min(ratios.values()) > 3.5


@pytest.mark.slow
@pytest.mark.coreai
def test_sentence_encoder_example_gains_from_unlabelled_text(tmp_path: Path) -> None:
    """A small part of the text, at one width: the workflow, and that it beats k-means."""
    out = run(
        str(ROOT / "examples/sentence_encoder/run.py"),
        "--sentences",
        "64",
        "--bits",
        "3",
        "--tune-steps",
        "2",
        "--out",
        str(tmp_path),
        cwd=tmp_path,
    )
    row = next(line.split("│") for line in out.splitlines() if line.startswith("│"))
    plain, fitted, tuned = (float(row[place]) for place in (4, 5, 6))
    assert fitted > plain + 0.02
    assert tuned > fitted - 0.01
    assert float(row[9]) < 1e-3  # Core AI against PyTorch
    assert (tmp_path / "accuracy.png").exists()


@pytest.mark.slow
@pytest.mark.coreai
def test_mixed_precision_example_beats_uniform_and_greedy(tmp_path: Path) -> None:
    script = str(ROOT / "examples/resnet50_mixed_precision/run.py")
    out = run(script, "--out", str(tmp_path), "--points", "3", cwd=tmp_path)
    lines = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    rows = {line[0].strip(): [cell.strip() for cell in line] for line in lines if len(line) == 7}
    kl = {name: float(row[5]) for name, row in rows.items()}
    psnr = {name: float(row[4]) for name, row in rows.items()}
    assert float(rows["MILP, refined; fitted to data"][1]) <= 4.0
    assert kl["MILP, refined; fitted to data"] <= kl["uniform 4-bit"] / 10
    assert psnr["MILP, refined"] >= psnr["greedy"] - 0.1
    for name in ("sensitivity.png", "curve.png", "recipe.yaml", "resnet.aimodel"):
        assert (tmp_path / name).exists()


@pytest.mark.slow
def test_mixed_precision_example_reads_imagenet_folders(tmp_path: Path) -> None:
    from PIL import Image

    for label in ("n01", "n02"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(3):
            pixels = np.full((300, 260, 3), 40 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    out = run(
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT / 'examples/resnet50_mixed_precision')!r})\n"
        "from model import imagenet, resnet50\nfrom pathlib import Path\nimport torch\n"
        f"parts = imagenet(Path({str(tmp_path / 'images')!r}), 4, 3)\n"
        "torch.save(resnet50().state_dict(), 'w.pth')\nmodel = resnet50(Path('w.pth'))\n"
        "print([tuple(x.shape) for x, _ in parts], [y.tolist() for _, y in parts])\n"
        "print(sum(p.ndim > 1 for p in model.parameters()), tuple(model(parts[0][0]).shape))\n",
        cwd=tmp_path,
    )
    assert "[(3, 3, 224, 224), (1, 3, 224, 224)] [[0, 0, 0], [1]]" in out
    assert "54 (3, 1000)" in out


@pytest.mark.slow
@pytest.mark.coreai
def test_resnet18_example_reads_cifar10(tmp_path: Path) -> None:
    """Made-up images in the published files' form, a narrow network, a few steps."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        part = {
            b"data": rng.integers(0, 256, (32, 3072), dtype=np.uint8),
            b"labels": rng.integers(0, 10, 32).tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(part))
    out = run(
        str(ROOT / "examples/resnet18_rdo/run.py"),
        "--cifar10",
        str(folder),
        "--width",
        "8",
        "--epochs",
        "1",
        "--fine-tune",
        "1",
        "--images",
        "64",
        "--batch",
        "16",
        "--steps",
        "3",
        "--out",
        str(tmp_path / "out"),
        cwd=tmp_path,
    )
    assert "32 held-out images, 64 calibration images" in out
    for name in ("4.19-integer", "3.0-integer", "3.0-palette"):
        report = json.loads((tmp_path / "out" / name / "report.json").read_text())
        assert report["bits_per_weight"] <= float(name.partition("-")[0])
        assert (tmp_path / "out" / name / "resnet18.aimodel").exists()


@pytest.mark.slow
@pytest.mark.coreai
def test_resnet18_example_keeps_its_accuracy(tmp_path: Path) -> None:
    run(str(ROOT / "examples/resnet18_rdo/run.py"), "--out", str(tmp_path), cwd=tmp_path)
    for name, most in (("4.19-integer", 0.5), ("3.0-integer", 1.0), ("3.0-palette", 1.0)):
        report = json.loads((tmp_path / name / "report.json").read_text())
        rows = {row["name"]: row for row in report["comparison"]}
        assert rows["uniform 8-bit"]["drop"] <= 0.3
        assert rows["rate-distortion"]["drop"] <= most
        assert rows["rate-distortion"]["bits_per_weight"] <= float(name.partition("-")[0])
        assert report["samples"] == 512


@pytest.mark.slow
@pytest.mark.coreai
@pytest.mark.coreml
@pytest.mark.executorch
def test_language_model_example_writes_the_same_text_on_every_runtime(tmp_path: Path) -> None:
    """One layer, trained for a moment: the workflow, and that runtimes agree with PyTorch."""
    out = run(
        str(ROOT / "examples/language_model/run.py"),
        "--modules",
        "30",
        "--layers",
        "1",
        "--steps",
        "20",
        "--cache",
        "48",
        "--pieces",
        "4",
        "--tokens",
        "16",
        "--out",
        str(tmp_path),
        cwd=tmp_path,
    )
    lines = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in line] for line in lines if line[1].strip()]
    assert len(rows) == 2 * 5
    for row in rows:
        form = row[0]
        bits, cache, perplexity = (float(cell) for cell in row[1:4])
        coreai, coreml, executorch = row[4:7]
        assert row[7:9] == ["16 of 16", "16 of 16"], form  # tokens as in PyTorch
        assert row[9] == "16 of 16" or form != "float32"
        assert (coreml == "refused") == ("int8 cache" in form)
        assert "refused" not in (coreai, executorch)
        assert (cache < 10) == ("int8 cache" in form)
        assert (bits < 5.1) == ("data" in form)
        assert perplexity < 256
    assert len(list(tmp_path.glob("*.aimodel"))) == 10


@pytest.mark.slow
@pytest.mark.onnx
def test_onnx_runtime_example_classifies_without_pytorch(tmp_path: Path) -> None:
    folder = ROOT / "examples/onnx_runtime"
    out = run(str(folder / "run.py"), "--out", str(tmp_path), cwd=tmp_path)
    lines = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    rows = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
    assert list(rows) == ["float32", "W8A8", "int8 weights", "4-bit tables", "int4 blocks"]
    for name, (size, accuracy, same, *_) in rows.items():
        assert float(accuracy.strip(" %")) > 95.0, name
        assert int(same.split()[0]) >= 449, name  # as PyTorch names it, all but a tie
        assert name == "float32" or float(size) < 0.5 * float(rows["float32"][0])
    words = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    words += f"sys.argv = ['classify.py', {str(tmp_path / 'digits-W8A8.onnx')!r}]\n"
    words += "import classify; classify.main(); print({'torch', 'graphopt'} & set(sys.modules))"
    said = run("-c", words, cwd=tmp_path)
    assert "of 450 digits" in said
    assert said.endswith("set()\n")  # neither was imported
