"""Compressed programs run on the runtime and are compared with PyTorch on the same dense weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("coreai_torch", reason="needs the extra 'coreai'")

import coreai_torch

from graphopt import coreai_utils
from graphopt.backends.coreai.backend import run_asset
from graphopt.coreai_utils import CompressionGranularity, DType, QScheme
from graphopt.errors import CompressionError, ConfigError, InputError
from graphopt.schemes.palettize import palettize
from graphopt.schemes.prune import mask_of
from graphopt.schemes.quantize import plan_blocks, quantize_weight
from graphopt.specs import (
    PalettizationSpec,
    PerChannelGranularity,
    PerGroupedChannelGranularity,
    PruningSpec,
    QuantizationSpec,
)
from graphopt.specs.pruning import NMStructured

pytestmark = pytest.mark.coreai
_names = itertools.count()


class Net(nn.Module):
    """Every place in which a program holds a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 64, 3, padding=1)
        self.fc = nn.Linear(64, 128)
        self.matrix = nn.Parameter(torch.randn(128, 96) / 10)
        self.up = nn.ConvTranspose2d(32, 48, 2)
        self.words = nn.Embedding(64, 128)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.relu(self.conv(x)).mean((2, 3))
        return torch.relu(self.fc(y)) @ self.matrix, self.up(x), self.words(ids)


OUTPUT_AXES = {"conv.weight": 0, "fc.weight": 0, "matrix": 1, "up.weight": 1, "words.weight": 0}
INPUT_AXES = {name: 1 - axis for name, axis in OUTPUT_AXES.items()}
INPUTS = {
    "x": torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0)),
    "ids": torch.randint(0, 64, (2, 3), generator=torch.Generator().manual_seed(0)),
}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def program(net: nn.Module) -> Any:
    exported = torch.export.export(net, tuple(INPUTS.values()))
    exported = exported.run_decompositions(coreai_torch.get_decomp_table())
    return coreai_torch.TorchConverter().add_exported_program(exported).to_coreai()


def saved(program: Any, folder: Path) -> Path:
    path = folder / f"net{next(_names)}.aimodel"
    program.save_asset(path)
    return path


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def with_weights(net: nn.Module, dense: Callable[[Tensor, int, int], Tensor]) -> list[Tensor]:
    """What PyTorch gives with every weight replaced by `dense(weight, output axis, input axis)`."""
    changed = copy.deepcopy(net)
    for name, parameter in changed.named_parameters():
        if name in OUTPUT_AXES:
            parameter.data = dense(parameter.data, OUTPUT_AXES[name], INPUT_AXES[name])
    return list(changed(*INPUTS.values()))


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        *[({"n_bits": bits}, PalettizationSpec(n_bits=bits)) for bits in (1, 2, 3, 4, 6, 8)],
        ({"lut_dtype": "int8"}, PalettizationSpec(lut_qspec=QuantizationSpec())),
        (
            {"lut_dtype": DType.FP8_E4M3FN},
            PalettizationSpec(lut_qspec=QuantizationSpec(dtype=torch.float8_e4m3fn)),
        ),
        (
            {"granularity": CompressionGranularity.PER_GROUPED_CHANNEL, "group_size": 16},
            PalettizationSpec(granularity=PerGroupedChannelGranularity(group_size=16)),
        ),
        ({"cluster_dim": 2}, PalettizationSpec(cluster_dim=2)),
        ({"enable_per_channel_scale": True}, PalettizationSpec(enable_per_channel_scale=True)),
        (
            {"enable_per_channel_scale": True, "lut_dtype": "uint8", "n_bits": 6},
            PalettizationSpec(
                n_bits=6,
                enable_per_channel_scale=True,
                lut_qspec=QuantizationSpec(dtype=torch.uint8),
            ),
        ),
    ],
)
def test_palettized_program_runs_with_its_tables(
    net: nn.Module, program: Any, options: dict[str, Any], spec: PalettizationSpec, tmp_path: Path
) -> None:
    small = saved(coreai_utils.palettize_weights(program, **options), tmp_path)
    wanted = with_weights(net, lambda w, out, _: palettize(w, spec, output_axis=out).dense())
    close(run_asset(small, INPUTS), wanted)
    elements = sum(net.get_parameter(name).numel() for name in OUTPUT_AXES)
    codes = elements * spec.n_bits / 8 / spec.cluster_dim
    assert codes < size(small) < codes + 16_000
    close(run_asset(saved(program, tmp_path), INPUTS), list(net(*INPUTS.values())))


@pytest.mark.parametrize("dtype", ["int2", "int4", "int8", "uint4", "fp8_e4m3fn", "fp8_e5m2"])
@pytest.mark.parametrize("scheme", [QScheme.SYMMETRIC, "asymmetric"])
def test_quantized_program_runs_with_its_integers(
    net: nn.Module, program: Any, dtype: str, scheme: str, tmp_path: Path
) -> None:
    if dtype.startswith("fp8") and scheme == "asymmetric":
        with pytest.raises(ConfigError, match="no zero point"):
            coreai_utils.quantize_weights(program, dtype, scheme)
        return
    small = saved(coreai_utils.quantize_weights(program, dtype, scheme), tmp_path)
    kind = {"fp8_e4m3fn": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}.get(dtype, dtype)

    def dense(weight: Tensor, out: int, _: int) -> Tensor:
        spec = QuantizationSpec(
            dtype=kind, qscheme=scheme, granularity=PerChannelGranularity(axis=out)
        )
        return quantize_weight(
            weight, spec, plan_blocks(weight.shape, out, spec.granularity)[0]
        ).dense()

    close(run_asset(small, INPUTS), with_weights(net, dense))


@pytest.mark.parametrize(
    ("options", "worst"),
    [
        ({"dtype": "int4", "granularity": "per_block", "block_size": 16}, 0.15),
        ({"dtype": "int8", "granularity": "per_tensor"}, 0.02),
        ({"dtype": "fp8_e4m3fn", "granularity": "per_block", "scale_dtype": "fp8_e8m0fnu"}, 0.08),
        ({"dtype": "fp4_e2m1fn", "granularity": "per_block"}, 0.25),
    ],
)
def test_blocks_and_powers_of_two_run(
    net: nn.Module, program: Any, options: dict[str, Any], worst: float, tmp_path: Path
) -> None:
    found = run_asset(saved(coreai_utils.quantize_weights(program, **options), tmp_path), INPUTS)
    for a, b in zip(found, net(*INPUTS.values()), strict=True):
        assert 1e-4 < (a - b).norm() / b.norm() < worst


@pytest.mark.parametrize("form", [{}, {"quantize_dtype": "uint8"}, {"palettize_nbits": 8}])
@pytest.mark.parametrize("ratio", [None, (2, 4)])
def test_sparse_program_runs_with_its_zeros(
    net: nn.Module,
    program: Any,
    form: dict[str, Any],
    ratio: tuple[int, int] | None,
    tmp_path: Path,
) -> None:
    target = {"target_sparsity": None, "n_m_ratio": ratio} if ratio else {}
    small = saved(coreai_utils.sparsify_weights(program, **target, **form), tmp_path)

    def dense(weight: Tensor, _: int, inputs: int) -> Tensor:
        scheme = {"pruning_scheme": NMStructured(n=2, m=4, axis=inputs)} if ratio else {}
        return weight * mask_of(weight, PruningSpec(**scheme))

    # 256 levels for the values that stay
    close(run_asset(small, INPUTS), with_weights(net, dense), 1e-5 if not form else 0.02)
    elements = sum(net.get_parameter(name).numel() for name in OUTPUT_AXES)
    # a mask, half of the elements, the program and tables of 256
    assert size(small) < elements * (17 if not form else 5) / 8 + 9_000 + 5 * 1024


def test_blocks_of_channels_become_zero_together(
    program: Any, net: nn.Module, tmp_path: Path
) -> None:
    small = coreai_utils.sparsify_weights(program, target_sparsity=0.75, block_size=4)
    found = run_asset(saved(small, tmp_path), INPUTS)
    rows = net.get_parameter("words.weight")[INPUTS["ids"].reshape(-1)]
    kept = found[2].reshape(rows.shape) != 0
    assert 0.1 < float(kept.float().mean()) < 0.4
    assert torch.equal(found[2].reshape(rows.shape)[kept], rows[kept])


def test_loaded_asset_is_compressed_like_the_program_it_was_saved_from(
    program: Any, tmp_path: Path
) -> None:
    from coreai.authoring import AIModelAsset

    loaded = AIModelAsset.load(saved(program, tmp_path)).program
    first = run_asset(saved(coreai_utils.palettize_weights(program), tmp_path), INPUTS)
    second = run_asset(saved(coreai_utils.palettize_weights(loaded), tmp_path), INPUTS)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_in_place_changes_the_given_program(net: nn.Module, tmp_path: Path) -> None:
    exported = torch.export.export(net, tuple(INPUTS.values()))
    exported = exported.run_decompositions(coreai_torch.get_decomp_table())
    own = coreai_torch.TorchConverter().add_exported_program(exported).to_coreai()
    assert coreai_utils.palettize_weights(own, in_place=True) is own
    assert size(saved(own, tmp_path)) < 50_000


def test_small_constants_stay(program: Any, tmp_path: Path) -> None:
    all_but_large = coreai_utils.palettize_weights(program, weight_num_threshold=128 * 96)
    whole = size(saved(program, tmp_path))
    assert whole - 8 * 4 * 64 * 32 * 9 < size(saved(all_but_large, tmp_path)) < whole


@pytest.mark.integration
def test_half_precision_weights_keep_their_type(net: nn.Module, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64)).half().eval()
    x = torch.randn(2, 64).half()
    exported = torch.export.export(model, (x,)).run_decompositions(coreai_torch.get_decomp_table())
    own = coreai_torch.TorchConverter().add_exported_program(exported).to_coreai()
    for small in (
        coreai_utils.palettize_weights(own, n_bits=8, enable_per_channel_scale=True),
        coreai_utils.quantize_weights(own, "int8"),
        coreai_utils.sparsify_weights(own, target_sparsity=0.01, quantize_dtype="int8"),
    ):
        (found,) = run_asset(saved(small, tmp_path), {"input": x})
        assert found.dtype == torch.float16
        assert (found - model(x)).abs().max() < 0.05


def test_weights_that_are_not_finite_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    model[1].weight.data[0, 0] = float("nan")
    x = torch.randn(2, 64)
    exported = torch.export.export(model, (x,)).run_decompositions(coreai_torch.get_decomp_table())
    own = coreai_torch.TorchConverter().add_exported_program(exported).to_coreai()
    before = size(saved(own, tmp_path))
    with pytest.raises(CompressionError, match="NaN or Inf"):
        coreai_utils.palettize_weights(own, in_place=True)
    assert size(saved(own, tmp_path)) == before


def test_weight_that_vectors_do_not_fit_stays_and_the_others_do_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 33)).eval(), torch.randn(2, 64)
    exported = torch.export.export(model, (x,)).run_decompositions(coreai_torch.get_decomp_table())
    own = coreai_torch.TorchConverter().add_exported_program(exported).to_coreai()
    small = saved(coreai_utils.palettize_weights(own, cluster_dim=2), tmp_path)
    assert "left as it is: cluster_dim=2 does not divide the 33 channels" in caplog.text
    first = model[0].weight
    first.data = palettize(first.data, PalettizationSpec(cluster_dim=2), output_axis=0).dense()
    close(run_asset(small, {"input": x}), [model(x)])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_weights_are_compressed(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = kind(32, 64, batch_first=True).eval(), torch.randn(2, 5, 32)
    exported = torch.export.export(model, (x,)).run_decompositions(coreai_torch.get_decomp_table())
    own = coreai_torch.TorchConverter().add_exported_program(exported).to_coreai()
    small = saved(coreai_utils.palettize_weights(own), tmp_path)
    weights = [each for each in model.parameters() if each.ndim == 2]
    assert size(small) < size(saved(own, tmp_path)) - 3 * sum(each.numel() for each in weights)
    for weight in weights:
        weight.data = palettize(weight.data, PalettizationSpec()).dense()
    close(run_asset(small, {"input": x})[:1], [model(x)[0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: coreai_utils.palettize_weights(p, n_bits=5), "n_bits must be one of"),
        (lambda p: coreai_utils.palettize_weights(p, "int4"), "lut_dtype must be one of"),
        (lambda p: coreai_utils.palettize_weights(p, granularity="per_block"), "granularity"),
        (lambda p: coreai_utils.palettize_weights(p, cluster_dim=0), "cluster_dim"),
        (lambda p: coreai_utils.quantize_weights(p, "int7"), "dtype must be one of"),
        (lambda p: coreai_utils.quantize_weights(p, "int8", "junk"), "qscheme must be one of"),
        (lambda p: coreai_utils.quantize_weights(p, "fp4_e2m1fn"), "per block of 32"),
        (
            lambda p: coreai_utils.quantize_weights(p, "int8", scale_dtype="fp8_e8m0fnu"),
            "is for fp8 weights",
        ),
        (
            lambda p: coreai_utils.palettize_weights(p, cluster_dim="2"),
            "cluster_dim must be a whole",
        ),
        (lambda p: coreai_utils.sparsify_weights(p, "0.5"), "target_sparsity must be in"),
        (
            lambda p: coreai_utils.quantize_weights(p, "int8", weight_num_threshold=None),
            "weight_num_threshold must be a whole number",
        ),
        (lambda p: coreai_utils.sparsify_weights(p, 1.5), "target_sparsity must be in"),
        (lambda p: coreai_utils.sparsify_weights(p, n_m_ratio=(1, 2)), "either target_sparsity"),
        (lambda p: coreai_utils.sparsify_weights(p, None, n_m_ratio=(3, 2)), "n_m_ratio must be"),
        (
            lambda p: coreai_utils.sparsify_weights(p, block_size=1),
            "block_size must be a whole number",
        ),
        (
            lambda p: coreai_utils.sparsify_weights(p, quantize_dtype="int8", palettize_nbits=4),
            "either quantize_dtype",
        ),
        (lambda p: coreai_utils.sparsify_weights(p, palettize_nbits=5), "palettize_nbits"),
    ],
)
def test_wrong_options_are_refused(program: Any, call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(program)


def test_other_objects_are_refused() -> None:
    with pytest.raises(InputError, match="expected an AIProgram, got str"):
        coreai_utils.palettize_weights("model.aimodel")
