"""Forms of tables in .pte files: each file is run, or unpacked and evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.executorch_nets import (
    IDS,
    IMAGE,
    SPECS,
    Convolutions,
    Words,
    grouped,
    palettized,
    saved,
)
from helpers.tiers import cases
from torch import Tensor, nn

import graphopt
from graphopt.palettization import (
    PalettizationSpec,
)
from graphopt.quantization import Quantizer, QuantizerConfig

pytestmark = pytest.mark.executorch


DECODED = {"3 bits in groups"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("delegate", "name"),
    [
        *cases(("xnnpack",), SPECS, default=lambda _, name: name in DECODED),
        *cases(
            ("portable",),
            ("4 bits", "3 bits in groups", "vectors in groups"),
            default=lambda _, name: name == "vectors in groups",
        ),
    ],
)
def test_codes_are_decoded_on_the_runtime(delegate: str, name: str, tmp_path: Path) -> None:
    for number, (model, x) in enumerate(((Convolutions(), IMAGE), (Words(), IDS))):
        program = palettized(model, x, SPECS[name])
        (tmp_path / str(number)).mkdir()
        artifact = saved(program, tmp_path / str(number), delegate=delegate, tables="compressed")
        assert artifact.verification.max_error < 1e-6
        notes = artifact.delegation.notes
        assert all(
            ("outliers" if name == "outliers" else "decoded at every call") in note
            for note in notes
        )
        assert len(notes) == len(program.report().palettized)


@pytest.mark.integration
@pytest.mark.parametrize("bits", cases((1, 2, 3, 4, 6, 8), default=lambda bits: bits in (1, 3, 6)))
def test_compressed_file_holds_the_codes_only(bits: int, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(512, 512)), torch.randn(1, 512)
    artifact = saved(
        palettized(model, x, PalettizationSpec(n_bits=bits)), tmp_path, tables="compressed"
    )
    codes = 512 * 512 * bits / 8
    # tables of bytes, the bias and the program itself
    assert codes < artifact.size < codes + 15_000
    assert artifact.verification.max_error < 1e-6


@pytest.mark.integration
def test_embedding_decodes_only_the_rows_it_reads(tmp_path: Path) -> None:
    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(4096, 64)

        def forward(self, ids: Tensor) -> Tensor:
            return self.words(ids) * 2.0

    for spec in (SPECS["4 bits"], PalettizationSpec(granularity=grouped(0, 16))):
        artifact = saved(
            palettized(Big(), IDS, spec), tmp_path, delegate="portable", tables="compressed"
        )
        assert artifact.verification.max_error == 0.0
        # 14 rows of 64 floats and what decodes them, not 4096
        assert artifact.planned_memory < 40_000
        (tmp_path / "model.pte").unlink()


@pytest.mark.slow
def test_int8_table_becomes_int8_weights_of_the_same_values(tmp_path: Path) -> None:
    config = {
        "palettization": {
            "global_config": {
                "op_state_spec": {"weight": {"n_bits": 4, "lut_qspec": {"dtype": "int8"}}}
            }
        },
        "quantization": {},
    }
    model = Convolutions().eval()
    program = graphopt.compress(
        model, (IMAGE,), config, calibration_data=[IMAGE], backend="executorch"
    )
    artifacts = {}
    for tables in ("int8", "dense", "auto"):
        (tmp_path / tables).mkdir()
        artifacts[tables] = saved(program, tmp_path / tables, tables=tables)
    small = artifacts["int8"]
    # at most one step of the last scale, the rounding of XNNPACK's requantization
    assert small.verification.max_error < 0.01
    assert small.delegation.delegates == 1
    assert not small.delegation.outside
    assert not small.delegation.notes
    assert small.buffer == artifacts["auto"].buffer
    weights = sum(p.numel() for p in model.parameters())
    assert artifacts["dense"].size - small.size > 2.5 * weights
    # the form before the delegate computes the very same weights
    assert torch.equal(small.lowered(IMAGE), artifacts["dense"].lowered(IMAGE))


@pytest.mark.integration
def test_passes_run_inside_executorch() -> None:
    """ExecuTorch runs `transform_passes` on its own dialect; ours are callables like any."""
    from executorch.exir import to_edge_transform_and_lower

    from graphopt.backends.executorch.legalize import DuplicateDequantize
    from graphopt.passes import RemoveUnused
    from graphopt.passes.pass_base import Pass

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.relu(y) + torch.sigmoid(y)

    quantizer = Quantizer(Twice().eval(), QuantizerConfig.presets.w8a8_affine())
    quantizer.prepare((IMAGE,), backend="executorch")
    quantizer.calibrate([IMAGE])
    program = quantizer.program()

    def most_readers(passes: list[Pass]) -> int:
        nonlocal edge
        edge = to_edge_transform_and_lower(program.export(), transform_passes=passes)
        nodes = edge.exported_program().graph_module.graph.nodes
        return max(len(n.users) for n in nodes if "dequantize_per_tensor" in str(n.target))

    edge: Any = None
    assert most_readers([RemoveUnused()]) > 1
    assert most_readers([RemoveUnused(), DuplicateDequantize()]) == 1
    want = program.module()(IMAGE)
    assert torch.allclose(edge.exported_program().module()(IMAGE), want, atol=1e-6)


@pytest.mark.integration
def test_default_takes_the_fastest_exact_form_of_each_weight(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(256, 32)
            self.first = nn.Linear(32, 64)
            self.second = nn.Linear(64, 16)

        def forward(self, ids: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(self.words(ids))))

    weight = {"n_bits": 4, "lut_qspec": {"dtype": "int8"}}
    config = {
        "palettization": {"global_config": {"op_state_spec": {"weight": weight}}},
        "quantization": {"module_name_configs": {"second": None}},
    }
    program = graphopt.compress(
        Mixed().eval(), (IDS,), config, calibration_data=[IDS], backend="executorch"
    )
    artifact = saved(program, tmp_path)
    assert artifact.verification.max_error < 0.02
    notes = {note.split(":")[0]: note for note in artifact.delegation.notes}
    assert "decoded at every call" in notes["words.weight"]
    # int8, between integers and beside floats, as XNNPACK's kernels take them
    assert not notes.keys() & {"first.weight", "second.weight"}
    constants = [value.dtype for value in artifact.lowered.buffers()]
    assert constants.count(torch.int8) >= 2


@pytest.mark.integration
@pytest.mark.parametrize(
    "conv",
    [
        pytest.param(nn.Conv2d(6, 8, 1), marks=pytest.mark.slow),
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.Conv2d(6, 8, (3, 2), stride=(2, 3), padding=(1, 0)),
        pytest.param(nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2), marks=pytest.mark.slow),
        pytest.param(nn.Conv2d(6, 8, 1, stride=2), marks=pytest.mark.slow),
        nn.Conv2d(6, 8, 3, padding=1, groups=2),
    ],
    ids=["1×1", "3×3", "oblong", "dilated", "1×1 strided", "groups"],
)
def test_convolutions_with_decoded_weights_run_as_linear_layers(
    conv: nn.Module, tmp_path: Path
) -> None:
    program = palettized(nn.Sequential(conv, nn.ReLU()), torch.randn(2, 6, 9, 11), SPECS["4 bits"])
    artifact = saved(program, tmp_path, tables="compressed")
    assert artifact.verification.max_error < 1e-6
    targets = [str(node.target) for node in artifact.lowered.graph.nodes]
    in_groups = conv.groups > 1
    assert any("conv2d" in target for target in targets) == in_groups
    assert ("aten.convolution.default" in artifact.delegation.outside) == in_groups
