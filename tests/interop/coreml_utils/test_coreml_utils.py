"""Built models are compressed, saved, read back and evaluated; weights are compared with ours and theirs."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("coremltools", reason="needs the extra 'coreml'")

import coremltools as ct

from graphopt import coreml_utils
from graphopt.backends.coreml.evaluate import dense_value, evaluate, load_program
from graphopt.errors import CompressionError, ConfigError, InputError
from graphopt.schemes.palettize import palettize
from graphopt.specs import (
    PalettizationSpec,
    PerBlockGranularity,
    PerChannelGranularity,
    PerGroupedChannelGranularity,
    QuantizationScheme,
    QuantizationSpec,
)

pytestmark = pytest.mark.coreml


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.up = nn.ConvTranspose2d(32, 48, 2)
        self.fc = nn.Linear(48, 64)
        self.words = nn.Embedding(128, 64)
        self.mixing = nn.Parameter(torch.randn(2, 64, 32) / 8)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = self.up(torch.relu(self.conv(x))).mean((2, 3))
        z = self.fc(y) + self.words(ids)
        return z, torch.stack([z, z]) @ self.mixing


INPUTS = {
    "x": torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)).numpy(),
    "ids": torch.randint(0, 128, (2,), generator=torch.Generator().manual_seed(0)).numpy(),
}
OUTPUT_AXES = {"conv": 0, "conv_transpose": 1, "linear": 0, "gather": 0, "matmul": 2}


def built(target: str, precision: str) -> Any:
    torch.manual_seed(0)
    exported = torch.export.export(
        Net().eval(), tuple(torch.from_numpy(each) for each in INPUTS.values())
    ).run_decompositions({})
    return ct.convert(
        exported,
        minimum_deployment_target=getattr(ct.target, target),
        compute_precision=getattr(ct.precision, precision.upper()),
        skip_model_load=True,
    )


@functools.cache
def built_once() -> Any:
    """For tests that do not change it."""
    return built("iOS18", "float16")


@pytest.fixture(scope="module", params=[("iOS16", "float32"), ("iOS18", "float16")], ids=str)
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "net.mlpackage"
    built(*request.param).save(str(path))
    return path


def opened(path: Path) -> Any:
    return ct.models.MLModel(str(path), skip_model_load=True)


def outputs(path: Path) -> list[Any]:
    result = evaluate(load_program(path), INPUTS)
    assert not result.unevaluated
    return list(result.outputs.values())


def weights(path: Path) -> dict[str, tuple[str, Any]]:
    """Op name → (type, dense weight) of what is on disk."""
    found = {}
    for op in load_program(path).functions["main"].operations:
        for slot in ("weight", "y", "x"):
            var = op.inputs.get(slot) if op.op_type in OUTPUT_AXES else None
            stored = var is not None and var.op is not None
            stored = stored and var.op.op_type.startswith("const")  # and constexpr
            value = dense_value(var) if stored else None
            if value is not None and value.size > 2048:
                found[op.name] = (op.op_type, np.asarray(value))
    return found


def sse(path: Path, reference: Path) -> float:
    exact = weights(reference)
    return sum(
        float(((value.astype(np.float64) - exact[name][1].astype(np.float64)) ** 2).sum())
        for name, (_, value) in weights(path).items()
    )


SPECS = {
    "4 bits": PalettizationSpec(),
    "2 bits": PalettizationSpec(n_bits=2),
    "3 bits": PalettizationSpec(n_bits=3),
    "groups": PalettizationSpec(granularity=PerGroupedChannelGranularity(group_size=16)),
    "int8 tables": PalettizationSpec(lut_qspec=QuantizationSpec()),
    "vectors": PalettizationSpec(cluster_dim=2),
    "channel scale": PalettizationSpec(enable_per_channel_scale=True),
}


@pytest.mark.integration
@pytest.mark.parametrize("name", SPECS)
def test_what_is_on_disk_are_our_tables(name: str, package: Path, tmp_path: Path) -> None:
    spec = SPECS[name]
    small = tmp_path / "small.mlpackage"
    coreml_utils.palettize_weights(opened(package), spec).save(str(small))
    exact, found = weights(package), weights(small)
    assert len(found) == 5
    for op, (kind, value) in found.items():
        weight = torch.from_numpy(exact[op][1].copy())
        want = palettize(weight, spec, output_axis=OUTPUT_AXES[kind]).dense().numpy()
        step = 1e-6 if value.dtype == np.float32 else 2e-3
        assert np.abs(value - want).max() <= step * np.abs(want).max()
    before, after = outputs(package), outputs(small)
    worst = 1.0 if name in ("2 bits", "vectors") else 0.4
    assert all(
        np.linalg.norm(a - b) < worst * np.linalg.norm(b)
        for a, b in zip(after, before, strict=True)
    )
    bits = spec.n_bits / spec.cluster_dim
    elements = sum(value.size for _, value in exact.values())
    stored = sum(file.stat().st_size for file in small.rglob("weight.bin"))
    assert stored < elements * bits / 8 + 12_000


@pytest.mark.parametrize(
    "spec",
    [
        QuantizationSpec(granularity=PerChannelGranularity()),
        QuantizationSpec(dtype=torch.uint8, qscheme=QuantizationScheme.ASYMMETRIC),
        QuantizationSpec(dtype=torch.int4, granularity=PerBlockGranularity(block_size=16)),
    ],
    ids=["int8 channels", "uint8 affine", "int4 blocks"],
)
def test_quantized_weights_are_read_back(
    spec: QuantizationSpec, package: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small.mlpackage"
    coreml_utils.quantize_weights(opened(package), spec).save(str(small))
    exact, found = weights(package), weights(small)
    step = 0.15 if spec.dtype == torch.int4 else 0.012
    for op, (_, value) in found.items():
        error = np.abs(value.astype(np.float32) - exact[op][1].astype(np.float32)).max()
        assert 0 < error < step * np.abs(exact[op][1]).max()
    assert len(found) == 5
    outputs(small)


@pytest.mark.integration
def test_tables_are_at_least_as_good_as_coremltools_own(package: Path, tmp_path: Path) -> None:
    from coremltools.optimize import coreml as cto

    ours, theirs = tmp_path / "ours.mlpackage", tmp_path / "theirs.mlpackage"
    coreml_utils.palettize_weights(opened(package)).save(str(ours))
    config = cto.OptimizationConfig(cto.OpPalettizerConfig(nbits=4, weight_threshold=2048))
    cto.palettize_weights(opened(package), config).save(str(theirs))
    # floats of 16 bits round both alike
    assert sse(ours, package) <= 1.001 * sse(theirs, package)


def test_keys_choose_by_name_then_op_then_type(package: Path, tmp_path: Path) -> None:
    model = opened(package)
    known = coreml_utils.weights_of(model)
    assert {kind for weight in known for _, kind in weight.ops} == set(OUTPUT_AXES)
    by_kind = {weight.ops[0][1]: weight for weight in known}
    small = tmp_path / "small.mlpackage"
    coreml_utils.palettize_weights(
        model,
        None,
        op_type_specs={"conv": SPECS["2 bits"], "linear": SPECS["2 bits"]},
        name_specs={by_kind["linear"].name: None, by_kind["gather"].ops[0][0]: SPECS["4 bits"]},
    ).save(str(small))
    exact = weights(package)
    distinct = {
        kind: len(np.unique(value.astype(np.float32))) for kind, value in weights(small).values()
    }
    assert distinct["conv"] == 4
    assert distinct["gather"] == 16
    for op, (kind, value) in weights(small).items():
        if kind in ("linear", "matmul", "conv_transpose"):
            assert np.array_equal(value, exact[op][1])


def test_compressed_weights_are_left_alone(package: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.mlpackage"
    coreml_utils.palettize_weights(opened(package)).save(str(small))
    assert not coreml_utils.weights_of(opened(small))
    again = tmp_path / "again.mlpackage"
    coreml_utils.quantize_weights(opened(small)).save(str(again))
    assert all(np.array_equal(a, b) for a, b in zip(outputs(small), outputs(again), strict=True))


@pytest.mark.integration
def test_model_in_memory_is_not_changed(tmp_path: Path) -> None:
    model = built("iOS18", "float16")
    model.short_description = "kept"
    before = copy.deepcopy(model.get_spec())
    small = coreml_utils.palettize_weights(model)
    assert model.get_spec() == before
    assert small.short_description == "kept"
    small.save(str(tmp_path / "small.mlpackage"))
    outputs(tmp_path / "small.mlpackage")


@pytest.mark.integration
def test_functions_of_one_model_are_kept_and_share_weights(tmp_path: Path) -> None:
    first, both = tmp_path / "one.mlpackage", tmp_path / "both.mlpackage"
    built("iOS18", "float16").save(str(first))
    described = ct.utils.MultiFunctionDescriptor()
    for name in ("a", "b"):
        described.add_function(str(first), "main", name)
    described.default_function_name = "a"
    ct.utils.save_multifunction(described, str(both))
    model = ct.models.MLModel(str(both), skip_model_load=True, function_name="a")
    small = tmp_path / "small.mlpackage"
    coreml_utils.palettize_weights(model).save(str(small))
    spec = ct.models.MLModel(str(small), skip_model_load=True, function_name="a").get_spec()
    assert {function.name for function in spec.description.functions} == {"a", "b"}
    one = tmp_path / "small_one.mlpackage"
    coreml_utils.palettize_weights(opened(first)).save(str(one))
    sizes = [sum(file.stat().st_size for file in path.rglob("weight.bin")) for path in (small, one)]
    assert sizes[0] < 1.1 * sizes[1]


@pytest.mark.integration
def test_tables_of_an_old_model_are_not_mixed_with_forms_that_it_cannot_hold(
    tmp_path: Path,
) -> None:
    small = tmp_path / "small.mlpackage"
    chosen = {"linear": None}
    coreml_utils.palettize_weights(built("iOS16", "float32"), op_type_specs=chosen).save(str(small))
    blocks = QuantizationSpec(granularity=PerBlockGranularity(block_size=16))
    with pytest.raises(InputError, match=r"constexpr_lut_to_dense of before iOS 18; compress the"):
        coreml_utils.quantize_weights(opened(small), blocks)


@pytest.mark.integration
def test_scales_of_channel_groups_raise_an_old_model(tmp_path: Path) -> None:
    path, exact = tmp_path / "small.mlpackage", tmp_path / "exact.mlpackage"
    model = built("iOS16", "float32")
    model.save(str(exact))
    groups = QuantizationSpec(granularity=PerGroupedChannelGranularity(group_size=4))
    small = coreml_utils.quantize_weights(model, groups)
    assert small.get_spec().specificationVersion == 9
    small.save(str(path))
    found, wanted = weights(path), weights(exact)
    assert set(found) == set(wanted)
    for name, (_, value) in wanted.items():
        assert np.abs(found[name][1] - value).max() <= np.abs(value).max() / 200


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layer = kind(48, 64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(1, 2, 64)
        first = (state, state) if isinstance(self.layer, nn.LSTM) else state
        return self.layer(x, first)[0]


@pytest.mark.integration
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_weights_are_found_and_read_back(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Recurrent(kind).eval(), torch.randn(2, 5, 48)
    whole = ct.convert(
        torch.jit.trace(model, x),
        inputs=[ct.TensorType(name="x", shape=x.shape)],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    small, large = tmp_path / "small.mlpackage", tmp_path / "large.mlpackage"
    coreml_utils.palettize_weights(whole).save(str(small))
    whole.save(str(large))
    inside = "Data/com.apple.CoreML/weights/weight.bin"
    matrices = [each for each in model.parameters() if each.ndim == 2]
    gain = (large / inside).stat().st_size - (small / inside).stat().st_size
    assert gain > 3.4 * sum(each.numel() for each in matrices)
    assert not coreml_utils.weights_of(opened(small))
    if kind is nn.LSTM:  # a loop over the steps, as a GRU becomes, is not evaluated on this host
        for weight in matrices:
            weight.data = palettize(weight.data, PalettizationSpec()).dense()
        found = next(iter(evaluate(load_program(small), {"x": x.numpy()}).outputs.values()))
        assert np.abs(found - model(x).detach().numpy()).max() < 1e-5


@pytest.mark.integration
def test_weights_that_are_not_finite_are_named() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.fc.weight.data[0, 0] = float("nan")

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    exported = torch.export.export(Broken().eval(), (torch.randn(1, 64),)).run_decompositions({})
    model = ct.convert(exported, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
    with pytest.raises(CompressionError, match="fc_weight.*NaN or Inf"):
        coreml_utils.palettize_weights(model)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: coreml_utils.palettize_weights(m, name_specs={"conv_9": None}),
            ConfigError,
            r"name_specs\['conv_9'\] matches no weight; closest",
        ),
        (
            lambda m: coreml_utils.quantize_weights(m, op_type_specs={"lineer": None}),
            ConfigError,
            r"closest: linear",
        ),
        (
            lambda m: coreml_utils.palettize_weights(m, PalettizationSpec(outlier_fraction=0.01)),
            ConfigError,
            "outlier_fraction",
        ),
        (
            lambda m: coreml_utils.quantize_weights(m, QuantizationSpec(dtype="float8_e4m3fn")),
            ConfigError,
            "holds weights of",
        ),
        (
            lambda m: coreml_utils.palettize_weights(m, PalettizationSpec(cluster_dim=5)),
            CompressionError,
            "cluster_dim=5",
        ),
        (
            lambda m: coreml_utils.quantize_weights(
                m, QuantizationSpec(dtype=torch.float8_e4m3fn, scale_dtype=torch.float8_e8m0fnu)
            ),
            ConfigError,
            "holds weights of",
        ),
        (
            lambda m: coreml_utils.quantize_weights(
                m, QuantizationSpec(scale_dtype=torch.float8_e8m0fnu)
            ),
            ConfigError,
            "scales are float16 or float32",
        ),
        (
            lambda m: coreml_utils.palettize_weights("net.mlpackage"),
            InputError,
            "expected a coremltools",
        ),
    ],
)
def test_wrong_requests_are_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call(built_once())
