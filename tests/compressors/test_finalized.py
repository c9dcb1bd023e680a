"""Finalized modules hold codes or floats, in memory or in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import InputError
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
)
from graphopt.quantization import QuantizationSpec, Quantizer
from graphopt.specs import PalettizationSpec

SPECS = {
    "tables": PalettizationSpec(),
    "int8 entries": PalettizationSpec(lut_qspec=QuantizationSpec(), enable_per_channel_scale=True),
    "outliers": PalettizationSpec(outlier_fraction=0.02, algorithm="kmeans"),
    "zeros in a mask": PalettizationSpec(sparsity_detection_threshold=0.4),
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def _prepared(spec: PalettizationSpec, x: Tensor) -> KMeansPalettizer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        weight = model[0].weight
        weight[weight.abs() < weight.abs().median()] = 0
    module = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    palettizer = KMeansPalettizer(model, KMeansPalettizerConfig(global_config=module))
    palettizer.prepare((x,))
    return palettizer


@pytest.mark.parametrize("name", SPECS)
def test_dense_weights_are_what_the_codes_stand_for(name: str, x: Tensor) -> None:
    palettizer = _prepared(SPECS[name], x)
    dense = palettizer.finalize(backend="torch", weights="dense")
    assert torch.equal(dense(x), palettizer.finalize(backend="torch")(x))
    assert sorted(dense.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def test_activations_stay_rounded_with_dense_weights(x: Tensor) -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval())
    quantizer.prepare((x,))
    quantizer.calibrate([x])
    dense = quantizer.finalize(backend="torch", weights="dense")
    torch.testing.assert_close(dense(x), quantizer.finalize(backend="torch")(x))
    assert any("quantize_per_tensor" in str(node.target) for node in dense.graph.nodes)


def test_dense_weights_are_for_evaluation_only(x: Tensor) -> None:
    with pytest.raises(InputError, match="dense weights"):
        _prepared(PalettizationSpec(), x).finalize(backend="executorch", weights="dense")


def test_tensors_move_to_files(x: Tensor, tmp_path: Path) -> None:
    palettizer = _prepared(PalettizationSpec(), x)
    want = palettizer.finalize(backend="torch")(x)
    folder = tmp_path / "weights"
    module = palettizer.finalize(backend="torch", mmap_dir=folder)
    assert torch.equal(module(x), want)
    files = sorted(folder.iterdir())
    assert [file.suffix for file in files] == [".safetensors"] * len(files)
    stored = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    assert sum(file.stat().st_size for file in files) >= stored


def test_a_folder_with_files_is_refused(x: Tensor, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        _prepared(PalettizationSpec(), x).finalize(backend="torch", mmap_dir=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
