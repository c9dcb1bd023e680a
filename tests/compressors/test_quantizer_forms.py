"""Quantizer: forms of activations, tied and half-precision weights, programs, tables."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers.quantized_net import Net, X, calibrated
from torch import Tensor, nn

from graphopt.palettization import KMeansPalettizer, KMeansPalettizerConfig
from graphopt.quantization import (
    ModuleQuantizerConfig,
    QuantizationFormulation,
    QuantizationScheme,
    QuantizationSpec,
    Quantizer,
    QuantizerConfig,
)
from graphopt.quantization.spec import PerChannelGranularity


# --- forms -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dtype", "form", "scheme"),
    [
        (dtype, form, scheme)
        for dtype in ("int8", "uint8", "fp8_e4m3", "fp8_e5m2")
        for form in QuantizationFormulation
        for scheme in QuantizationScheme
        # float types have neither minimum nor zero point
        if not (dtype.startswith("fp8") and (form == "minval" or scheme == "asymmetric"))
    ],
)
def test_every_form_of_activation_converts_to_what_was_prepared(
    dtype: str, form: QuantizationFormulation, scheme: QuantizationScheme
) -> None:
    spec = QuantizationSpec(dtype=dtype, qscheme=scheme, qformulation=form)
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_input_spec={"*": spec}, op_output_spec={"*": spec})
    )
    quantizer = calibrated(Net().eval(), config)
    x = torch.randn(2, 3, 8, 8)
    got, want = quantizer.finalize(backend="torch")(x), quantizer._ready()(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_per_channel_activations_convert_to_what_was_prepared() -> None:
    spec = QuantizationSpec(granularity=PerChannelGranularity(axis=1))
    config = QuantizerConfig(
        global_config=None,
        module_name_configs={"conv": ModuleQuantizerConfig(op_input_spec={"*": spec})},
    )
    quantizer = calibrated(Net().eval(), config)
    torch.testing.assert_close(quantizer.finalize(backend="torch")(X), quantizer._ready()(X))


def test_half_precision_models_are_quantized() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(torch.bfloat16)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    quantizer = calibrated(model, None, (x,))
    finalized = quantizer.finalize(backend="torch")
    assert finalized(x).dtype == torch.bfloat16
    torch.testing.assert_close(finalized(x), quantizer._ready()(x))
    torch.testing.assert_close(finalized(x), model(x), rtol=0.1, atol=0.05)


def test_tied_weights_are_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 8)
            self.head = nn.Linear(8, 16, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    quantizer = calibrated(Tied(), None, (torch.randint(0, 16, (2, 5)),))
    (row,) = quantizer.summary().quantized
    assert {row.name, *row.aliases} == {"embed.weight", "head.weight"}
    state = quantizer.finalize(backend="torch").state_dict()
    assert sum("quantized" in name for name in state) == 1
    assert not any(name.endswith("weight") for name in state)


def test_programs_save_load_copy_and_pickle(tmp_path: object) -> None:
    quantizer = calibrated(Net().eval())
    finalized = quantizer.finalize(backend="torch")
    want = finalized(X)
    exported = torch.export.export(finalized, (X,))
    stream = io.BytesIO()
    torch.export.save(exported, stream)
    stream.seek(0)
    torch.testing.assert_close(torch.export.load(stream).module()(X), want)
    prepared = copy.deepcopy(quantizer._ready())
    torch.testing.assert_close(prepared(X), want)
    stream = io.BytesIO()
    torch.save(prepared, stream)
    stream.seek(0)
    torch.testing.assert_close(torch.load(stream, weights_only=False)(X), want)
    torch.testing.assert_close(quantizer.finalize(prepared, backend="torch")(X), want)


def test_prepared_module_exports() -> None:
    prepared = calibrated(Net().eval())._ready()
    exported = torch.export.export(prepared, (X,))
    torch.testing.assert_close(exported.module()(X), prepared(X), rtol=1e-4, atol=1e-4)


# --- beside palettization --------------------------------------------------------------------------
@pytest.mark.coreai
@pytest.mark.parametrize("through", ["coreai", "torch", "program"])
def test_palettized_model_gets_quantized_activations(through: str) -> None:
    model = Net().eval()
    lut = QuantizationSpec()
    config = KMeansPalettizerConfig.presets.w4(group_size=4)
    spec = config.global_config.op_state_spec["weight"]  # type: ignore[union-attr]
    spec = spec.model_copy(update={"lut_qspec": lut})
    config.global_config.op_state_spec = {"weight": spec}  # type: ignore[union-attr]
    palettizer = KMeansPalettizer(model, config)
    palettizer.prepare((X,), fold_batch_norm=True)
    source = palettizer.program() if through == "program" else palettizer.finalize(backend=through)
    activations = QuantizerConfig(global_config=ModuleQuantizerConfig(op_state_spec=None))
    quantizer = Quantizer(source, activations)
    prepared = quantizer.prepare((X,))
    quantizer.calibrate([X])
    finalized = quantizer.finalize(backend="torch")
    torch.testing.assert_close(finalized(X), prepared(X), rtol=1e-5, atol=1e-5)
    targets = [str(node.target) for node in finalized.graph.nodes]
    assert targets.count("graphopt.lut_to_dense.default") == 3
    assert sum("quantize_per_tensor" in t for t in targets) >= 6
    assert all(row.status != "quantized" for row in quantizer.summary())


def test_tables_and_activations_in_one_prepare_are_those_of_two_steps() -> None:
    model = Net().eval()
    tables = KMeansPalettizerConfig.presets.w4(group_size=4)
    activations = QuantizerConfig(global_config=ModuleQuantizerConfig(op_state_spec=None))
    combined = Quantizer(model, activations, palettization=tables)
    combined.prepare((X,))
    combined.calibrate([X])
    palettizer = KMeansPalettizer(model, tables)
    palettizer.prepare((X,), fold_batch_norm=True)
    two_steps = calibrated(palettizer.program(), activations)  # type: ignore[arg-type]
    one, two = combined.finalize(backend="torch"), two_steps.finalize(backend="torch")
    torch.testing.assert_close(one(X), two(X), rtol=0, atol=0)
    assert len(combined.summary().palettized) == 3


def test_weights_without_tables_are_quantized_in_the_same_prepare() -> None:
    tables = KMeansPalettizerConfig.presets.w4(group_size=4).without("fc")
    quantizer = Quantizer(Net().eval(), palettization=tables)
    quantizer.prepare((X,))
    table = quantizer.summary()
    assert {row.name for row in table.palettized} == {"conv.weight", "conv2.weight"}
    assert {row.name for row in table.quantized} == {"fc.weight"}


def test_weights_with_tables_keep_one_row_when_activations_are_quantized() -> None:
    model, x = (
        nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8)).eval(),
        torch.randn(2, 16),
    )
    palettizer = KMeansPalettizer(model)
    palettizer.prepare((x,))
    quantizer = Quantizer(palettizer.program())
    quantizer.prepare((x,))
    quantizer.calibrate([x])
    rows = quantizer.program().report()
    assert [(row.name, row.status) for row in rows] == [
        ("0.weight", "palettized"),
        ("2.weight", "palettized"),
    ]
    assert rows.activations
