"""Delegates and forms of tables in .pte files: each file is run, or unpacked and evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import pipelines
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.errors import LoweringError
from graphopt.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity
from graphopt.quantization import Quantizer, QuantizerConfig
from graphopt.specs import QuantizationSpec

pytestmark = pytest.mark.executorch


def grouped(axis: int, size: int) -> PerGroupedChannelGranularity:
    return PerGroupedChannelGranularity(axis=axis, group_size=size)


SPECS = {
    "1 bit": PalettizationSpec(n_bits=1),
    "2 bits": PalettizationSpec(n_bits=2),
    "3 bits": PalettizationSpec(n_bits=3),
    "4 bits": PalettizationSpec(n_bits=4),
    "6 bits": PalettizationSpec(n_bits=6),
    "8 bits": PalettizationSpec(n_bits=8),
    "groups of rows": PalettizationSpec(granularity=grouped(0, 2)),
    "3 bits in groups": PalettizationSpec(n_bits=3, granularity=grouped(0, 4)),
    "groups of columns": PalettizationSpec(granularity=grouped(1, 4)),
    "vectors": PalettizationSpec(cluster_dim=2),
    "vectors in groups": PalettizationSpec(n_bits=2, cluster_dim=2, granularity=grouped(1, 4)),
    "channel scale": PalettizationSpec(enable_per_channel_scale=True),
    "int8 table": PalettizationSpec(lut_qspec=QuantizationSpec()),
    "int8 tables": PalettizationSpec(lut_qspec=QuantizationSpec(), granularity=grouped(0, 4)),
    "outliers": PalettizationSpec(outlier_fraction=0.02),
}


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


class Words(nn.Module):
    """An embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(128, 32)
        self.head = nn.Linear(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 128, (2, 7), generator=torch.Generator().manual_seed(0))


def palettized(model: nn.Module, example: Tensor, spec: PalettizationSpec) -> CompressedProgram:
    inside = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    config = KMeansPalettizerConfig(global_config=inside)
    return pipelines.palettize(config).run(model.eval(), (example,))


def saved(program: CompressedProgram, path: Path, **options: Any) -> Any:
    artifact = graphopt.lower(program, "executorch", **options)
    artifact.save(path / "model.pte")
    return artifact


@pytest.mark.parametrize(
    ("delegate", "name"),
    [
        *(("xnnpack", name) for name in SPECS),
        *(("portable", name) for name in ("4 bits", "3 bits in groups", "vectors in groups")),
    ],
)
def test_codes_are_decoded_on_the_runtime(delegate: str, name: str, tmp_path: Path) -> None:
    for number, (model, x) in enumerate(((Convolutions(), IMAGE), (Words(), IDS))):
        program = palettized(model, x, SPECS[name])
        (tmp_path / str(number)).mkdir()
        artifact = saved(program, tmp_path / str(number), delegate=delegate, tables="compressed")
        assert artifact.verify().max_error < 1e-6
        notes = artifact.delegation.notes
        assert all(
            ("outliers" if name == "outliers" else "decoded at every call") in note
            for note in notes
        )
        assert len(notes) == len(program.report().palettized)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_compressed_file_holds_the_codes_only(bits: int, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(512, 512)), torch.randn(1, 512)
    artifact = saved(
        palettized(model, x, PalettizationSpec(n_bits=bits)), tmp_path, tables="compressed"
    )
    codes = 512 * 512 * bits / 8
    # tables of bytes, the bias and the program itself
    assert codes < artifact.size < codes + 15_000
    assert artifact.verify().max_error < 1e-6


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
        assert artifact.verify().max_error == 0.0
        # 14 rows of 64 floats and what decodes them, not 4096
        assert artifact.planned_memory < 40_000
        (tmp_path / "model.pte").unlink()


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
    assert small.verify().max_error < 0.01
    assert small.delegation.delegates == 1
    assert not small.delegation.outside
    assert not small.delegation.notes
    assert small.buffer == artifacts["auto"].buffer
    weights = sum(p.numel() for p in model.parameters())
    assert artifacts["dense"].size - small.size > 2.5 * weights
    # the form before the delegate computes the very same weights
    assert torch.equal(small.lowered(IMAGE), artifacts["dense"].lowered(IMAGE))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("delegate", ["coreml", "coreai"])
def test_targets_delegates_hold_every_form(name: str, delegate: str, tmp_path: Path) -> None:
    pytest.importorskip("coremltools" if delegate == "coreml" else "coreai_torch")
    program = palettized(Convolutions(), IMAGE, SPECS[name])
    artifact = saved(program, tmp_path, delegate=delegate, precision="float32")
    outcome = artifact.verify()
    assert outcome.max_error < 1e-6
    assert f"evaluated its {delegate} part" in outcome.how
    assert artifact.delegation.delegates == 1
    assert not artifact.delegation.outside
    dense = sum(4 * p.numel() for p in Convolutions().parameters())
    assert artifact.size < dense if name != "8 bits" else True


@pytest.mark.parametrize("delegate", ["coreml", "coreai"])
def test_targets_delegates_take_words_and_two_outputs(delegate: str, tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Words()

        def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            inside = self.inner.words(ids)
            return self.inner.head(inside) + x, inside

    pytest.importorskip("coremltools" if delegate == "coreml" else "coreai_torch")
    program = pipelines.palettize().run(Both().eval(), (IDS, torch.randn(16)))
    artifact = saved(program, tmp_path, delegate=delegate, precision="float32")
    outcome = artifact.verify()
    assert len(outcome.outputs) == 2
    assert outcome.max_error < 1e-6


@pytest.mark.parametrize("delegate", ["portable", "coreml", "coreai"])
def test_quantized_activations_go_through_every_delegate(delegate: str, tmp_path: Path) -> None:
    if delegate != "portable":
        pytest.importorskip("coremltools" if delegate == "coreml" else "coreai_torch")
    quantizer = Quantizer(Convolutions().eval(), QuantizerConfig())
    quantizer.prepare((IMAGE,))
    quantizer.calibrate([IMAGE])
    options = {} if delegate == "portable" else {"precision": "float32"}
    artifact = saved(quantizer.program(), tmp_path, delegate=delegate, **options)
    assert artifact.verify().max_error < 1e-6


def test_tables_and_activations_go_through_the_core_ml_delegate(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    program = graphopt.compress(
        Convolutions().eval(),
        (IMAGE,),
        {"palettization": {}, "quantization": {}},
        calibration_data=[IMAGE],
    )
    artifact = saved(program, tmp_path, delegate="coreml")
    outcome = artifact.verify()
    assert outcome.max_error < 0.01
    assert outcome.weights == 3


def test_weight_that_two_ops_read_stays_a_table_for_each(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(128, 128)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.fc(x)))

    program = palettized(Twice(), torch.randn(1, 128), SPECS["4 bits"])
    artifact = saved(program, tmp_path, delegate="coreml", precision="float32")
    assert artifact.verify().max_error < 1e-6
    assert artifact.size < 30_000  # the dense weight would be 65,536


def test_fp16_of_a_delegate_is_its_targets(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    program = palettized(Convolutions(), IMAGE, SPECS["4 bits"])
    half = saved(program, tmp_path, delegate="coreml")
    assert 1e-6 < half.verify().max_error < 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delegate": "vulkan"}, "delegate must be one of"),
        ({"tables": "packed"}, "tables must be one of"),
        ({"precision": "float16"}, "no option .'precision'. for xnnpack"),
        ({"delegate": "coreai", "minimum_deployment_target": "iOS18"}, "'coreai'"),
        ({"delegate": "coreml", "minimum_deployment_target": "iOS9"}, "minimum_deployment_target"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    pytest.importorskip("coremltools")
    program = palettized(Words(), IDS, SPECS["4 bits"])
    with pytest.raises(LoweringError, match=message):
        graphopt.lower(program, "executorch", **options)


def test_core_ml_of_an_older_system_refuses_what_it_cannot_hold() -> None:
    pytest.importorskip("coremltools")
    program = palettized(Words(), IDS, SPECS["groups of rows"])
    with pytest.raises(LoweringError, match=r"several tables for iOS17"):
        graphopt.lower(program, "executorch", delegate="coreml", minimum_deployment_target="iOS17")


def test_passes_run_inside_executorch() -> None:
    """ExecuTorch runs `transform_passes` on its own dialect; ours are callables like any."""
    from executorch.exir import to_edge_transform_and_lower

    from graphopt.backends.executorch.legalize import DuplicateDequantize
    from graphopt.passes import RemoveUnused

    quantizer = Quantizer(Convolutions().eval(), QuantizerConfig())
    quantizer.prepare((IMAGE,))
    quantizer.calibrate([IMAGE])
    program = quantizer.program()
    edge = to_edge_transform_and_lower(
        program.export(), transform_passes=[RemoveUnused(), DuplicateDequantize()]
    )
    nodes = edge.exported_program().graph_module.graph.nodes
    values = [node for node in nodes if "dequantize_per_tensor" in str(node.target)]
    assert values
    assert all(len(node.users) == 1 for node in values)
    want = program.module()(IMAGE)
    assert torch.allclose(edge.exported_program().module()(IMAGE), want, atol=1e-6)


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
    assert artifact.verify().max_error < 0.02
    notes = {note.split(":")[0]: note for note in artifact.delegation.notes}
    assert "decoded at every call" in notes["words.weight"]
    assert "first.weight" not in notes  # int8, as XNNPACK computes it
    assert "stored as a dense weight" in notes["second.weight"]


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 8, 1),
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.Conv2d(6, 8, (3, 2), stride=(2, 3), padding=(1, 0)),
        nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2),
        nn.Conv2d(6, 8, 1, stride=2),
        nn.Conv2d(6, 8, 3, padding=1, groups=2),
    ],
    ids=["1×1", "3×3", "oblong", "dilated", "1×1 strided", "groups"],
)
def test_convolutions_with_decoded_weights_run_as_linear_layers(
    conv: nn.Module, tmp_path: Path
) -> None:
    program = palettized(nn.Sequential(conv, nn.ReLU()), torch.randn(2, 6, 9, 11), SPECS["4 bits"])
    artifact = saved(program, tmp_path, tables="compressed")
    assert artifact.verify().max_error < 1e-6
    targets = [str(node.target) for node in artifact.lowered.graph.nodes]
    in_groups = conv.groups > 1
    assert any("conv2d" in target for target in targets) == in_groups
    assert ("aten.convolution.default" in artifact.delegation.outside) == in_groups
