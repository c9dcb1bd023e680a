"""What every target must do with every form of a table that it can hold, and with the rest."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.analysis.lookups import find_lookups
from graphopt.backends import BACKENDS, Backend, load_backend, lowering
from graphopt.backends.base import compare_outputs
from graphopt.errors import ArtifactExistsError, LoweringError, StateError
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity
from graphopt.quantization import QuantizationScheme, QuantizationSpec

TARGETS = [
    pytest.param("coreai", marks=pytest.mark.coreai),
    pytest.param("coreml", marks=pytest.mark.coreml),
    "torch",
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 8, 3)  # "lut" is part of this name
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.embed = nn.Embedding(32, 8)
        self.fc = nn.Linear(4, 8)
        self.right = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = self.up(torch.relu(self.convolution(x)))
        return self.fc(y.mean((2, 3))) @ self.right + self.embed(ids).mean(1), y


ARGS = (torch.randn(1, 4, 6, 6), torch.randint(0, 32, (1, 5)))
GROUPS = PerGroupedChannelGranularity(group_size=4)
UINT8 = QuantizationSpec(dtype=torch.uint8, qscheme=QuantizationScheme.ASYMMETRIC)
SPECS = {
    **{f"{bits} bits": PalettizationSpec(n_bits=bits) for bits in (1, 2, 3, 4, 6, 8)},
    "groups": PalettizationSpec(granularity=GROUPS, n_bits=2),
    "groups on axis 1": PalettizationSpec(
        granularity=PerGroupedChannelGranularity(axis=1, group_size=4), n_bits=3
    ),
    "vectors": PalettizationSpec(cluster_dim=2),
    "vectors in groups": PalettizationSpec(cluster_dim=2, granularity=GROUPS),
    "int8 table": PalettizationSpec(lut_qspec=QuantizationSpec()),
    "uint8 tables in groups": PalettizationSpec(lut_qspec=UINT8, granularity=GROUPS, n_bits=3),
    "channel scale": PalettizationSpec(enable_per_channel_scale=True),
    "outliers": PalettizationSpec(outlier_fraction=0.05),
    "outliers, scales and int8 tables": PalettizationSpec(
        outlier_fraction=0.05, enable_per_channel_scale=True, lut_qspec=QuantizationSpec()
    ),
    "everything": PalettizationSpec(
        enable_per_channel_scale=True,
        lut_qspec=QuantizationSpec(),
        granularity=PerGroupedChannelGranularity(axis=1, group_size=4),
        cluster_dim=2,
    ),
}


def palettized(spec: PalettizationSpec) -> KMeansPalettizer:
    torch.manual_seed(0)
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )
    palettizer = KMeansPalettizer(Net().eval(), config)
    palettizer.prepare(ARGS)
    return palettizer


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SPECS)
def test_every_form_of_table_is_executed_and_equal(name: str, target: str, tmp_path: Path) -> None:
    palettizer = palettized(SPECS[name])
    options = {"precision": "float32"} if target != "torch" else {}
    artifact = graphopt.lower(palettizer.program(), target, **options)
    artifact.save(tmp_path / f"net{artifact.suffix}")
    outcome = artifact.verify()
    assert outcome.complete
    assert outcome.max_error < 1e-6
    assert outcome.weights == 5


@pytest.mark.coreai
@pytest.mark.parametrize("name", SPECS)
def test_module_finalized_for_core_ai_goes_to_every_other_target(name: str) -> None:
    palettizer = palettized(SPECS[name])
    neutral = palettizer.program()
    finalized = palettizer.finalize(backend="coreai")
    torch.testing.assert_close(finalized(*ARGS)[0], neutral.graph_module(*ARGS)[0])
    raised = lowering.as_program(finalized, ARGS)
    torch.testing.assert_close(raised.graph_module(*ARGS)[0], neutral.graph_module(*ARGS)[0])
    before, after = find_lookups(neutral.graph_module), find_lookups(raised.graph_module)
    assert [lookup.n_bits for lookup in before] == [lookup.n_bits for lookup in after]
    assert [lookup.lut_dtype for lookup in before] == [lookup.lut_dtype for lookup in after]
    assert [lookup.outliers for lookup in before] == [lookup.outliers for lookup in after]
    masks = [
        {name for name, _ in each.graph_module.named_buffers() if name.endswith("_outlier_mask")}
        for each in (neutral, raised)
    ]
    assert masks[0] == masks[1]
    assert not any("coreai" in str(n.target) for n in raised.graph_module.graph.nodes)


@pytest.mark.parametrize("target", TARGETS)
def test_size_follows_the_bits(target: str, tmp_path: Path) -> None:
    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(512, 512, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    x = (torch.randn(1, 512),)
    sizes = {}
    for bits in (1, 2, 3, 4, 6, 8):
        config = KMeansPalettizerConfig(
            global_config=ModuleKMeansPalettizerConfig(
                op_state_spec={"weight": PalettizationSpec(n_bits=bits)}
            )
        )
        palettizer = KMeansPalettizer(Big(), config)
        palettizer.prepare(x)
        artifact = graphopt.lower(palettizer.program(), target)
        artifact.save(tmp_path / f"{bits}{artifact.suffix}")
        sizes[bits] = artifact.size
    stored = load_backend(target).capabilities.stored_bits
    for bits, size in sizes.items():
        weight = 512 * 512 * (stored(bits) or 0) / 8 + 4 * 2 ** (stored(bits) or 0)
        # everything else (graph, metadata) is the same for all widths
        overhead = sizes[1] - (512 * 512 / 8 + 8)
        assert size == pytest.approx(weight + overhead, abs=3000)


@pytest.mark.coreml
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("3 bits", r"3-bit indices for iOS16; raise .* use 2 bits"),
        ("groups", "several tables for iOS16"),
        ("vectors", "cluster_dim=2 for iOS16"),
        ("int8 table", "tables of int8 for iOS16"),
        ("channel scale", "per-channel scale for iOS16"),
        ("outliers", "sparse outliers for iOS16"),
    ],
)
def test_older_core_ml_refuses_what_it_cannot_hold(name: str, message: str) -> None:
    program = palettized(SPECS[name]).program()
    with pytest.raises(LoweringError, match=message):
        graphopt.lower(program, "coreml", minimum_deployment_target="iOS16")


@pytest.mark.coreml
@pytest.mark.parametrize("ios", ["iOS16", "iOS17"])
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_older_core_ml_takes_the_packed_form(ios: str, bits: int, tmp_path: Path) -> None:
    program = palettized(PalettizationSpec(n_bits=bits)).program()
    artifact = graphopt.lower(program, "coreml", minimum_deployment_target=ios, precision="float32")
    artifact.save(tmp_path / "net.mlpackage")
    outcome = artifact.verify()
    assert outcome.max_error < 1e-6
    assert outcome.weights == 5


@pytest.mark.coreml
def test_core_ml_refuses_fp8_tables_and_names_layer_feature_and_way_out() -> None:
    spec = PalettizationSpec(lut_qspec=QuantizationSpec(dtype=torch.float8_e4m3fn))
    palettizer = palettized(spec)
    with pytest.raises(LoweringError, match=r"fc.weight: tables of fp8_e4m3; use one of .*int8"):
        palettizer.finalize(backend="coreml")


@pytest.mark.coreai
def test_core_ai_takes_fp8_tables(tmp_path: Path) -> None:
    spec = PalettizationSpec(lut_qspec=QuantizationSpec(dtype=torch.float8_e4m3fn))
    artifact = graphopt.lower(palettized(spec).program(), "coreai")
    artifact.save(tmp_path / "net.aimodel")
    assert artifact.verify().max_error < 1e-6


@pytest.mark.parametrize("target", TARGETS)
def test_saving_refuses_to_overwrite_and_leaves_nothing_behind(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = graphopt.lower(palettized(PalettizationSpec()).program(), target)
    path = tmp_path / f"net{artifact.suffix}"
    with pytest.raises(StateError, match="save the artifact"):
        artifact.verify()
    artifact.save(path)
    size = artifact.size
    with pytest.raises(ArtifactExistsError, match="overwrite=True"):
        artifact.save(path)

    def fail(target_path: Path) -> None:
        target_path.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(artifact, "_write", fail)
        with pytest.raises(OSError, match="disk full"):
            artifact.save(path, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert artifact.size == size
    artifact.save(path, overwrite=True)
    assert artifact.verify().max_error < 1e-2
    with pytest.raises(LoweringError, match="must end in"):
        artifact.save(tmp_path / "net.bin")


@pytest.mark.parametrize("target", TARGETS)
def test_verification_notices_another_models_weights(target: str, tmp_path: Path) -> None:
    program = palettized(PalettizationSpec()).program()
    artifact = graphopt.lower(program, target)
    artifact.save(tmp_path / f"net{artifact.suffix}")
    with torch.no_grad():
        program.graph_module.get_buffer("fc.weight_lut").mul_(1.5)
    changed = load_backend(target).check(artifact.path, program, ARGS, {})
    assert changed.max_error > 0.05


@pytest.mark.parametrize("target", TARGETS)
def test_unknown_options_are_refused(target: str) -> None:
    program = palettized(PalettizationSpec()).program()
    with pytest.raises(LoweringError, match="no option"):
        graphopt.lower(program, target, optimise=True)


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(LoweringError, match="no backend 'onnx'"):
        load_backend("onnx")


@pytest.mark.parametrize("target", list(BACKENDS))
def test_backends_load_by_name(target: graphopt.ExportBackend) -> None:
    assert isinstance(load_backend(target), Backend)


def test_compressed_program_saves_by_suffix(tmp_path: Path) -> None:
    program = palettized(PalettizationSpec()).program()
    assert program.report()["fc.weight"].n_bits == 4
    path = program.save(tmp_path / "net.pt2")
    again = graphopt.capture(path)
    torch.testing.assert_close(again.graph_module(*ARGS), program.graph_module(*ARGS))
    with pytest.raises(LoweringError, match="no target for '.onnx'"):
        program.save(tmp_path / "net.onnx")


@pytest.mark.coreml
def test_op_that_cannot_be_evaluated_is_named_and_the_check_is_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.backends.coreml import evaluate, mil_ops

    artifact = graphopt.lower(palettized(PalettizationSpec()).program(), "coreml")
    artifact.save(tmp_path / "net.mlpackage")
    known = {name: rule for name, rule in mil_ops.OPS.items() if name != "conv"}
    monkeypatch.setattr(evaluate, "OPS", known)
    outcome = artifact.verify()
    assert not outcome.complete
    assert outcome.notes == ("no rule for MIL op conv",)
    assert outcome.weights == 5


@pytest.mark.parametrize(
    ("found", "wanted", "error"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([math.nan, 1.0], [1.0, 1.0], math.inf),
        ([1.0, 1.0], [math.nan, 1.0], math.inf),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf),
        ([math.nan, math.inf, 1.5], [math.nan, math.inf, 1.0], 0.5),
        ([0.25], [0.0], 0.25),
        ([], [], 0.0),
    ],
)
def test_what_is_not_finite_is_no_agreement(
    found: list[float], wanted: list[float], error: float
) -> None:
    assert compare_outputs([torch.tensor(found)], [torch.tensor(wanted)]) == (error,)
