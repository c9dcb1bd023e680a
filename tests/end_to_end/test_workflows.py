"""The documented ways of users, as written."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import zoo
from helpers.tiers import some
from torch import nn

import graphopt
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity


@pytest.mark.integration
@pytest.mark.coreai
@pytest.mark.parametrize("name", some(["resnet", "bert"], lambda name: name == "bert"))
def test_core_ai_tutorial_steps_work_on_the_finalized_module(name: str, tmp_path: Path) -> None:
    import coreai_torch

    from graphopt.backends.coreai.backend import run_asset

    model, args = zoo.MODELS[name]()
    granularity = PerGroupedChannelGranularity(axis=0, group_size=2)
    spec = PalettizationSpec(n_bits=4, granularity=granularity)
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )
    palettizer = KMeansPalettizer(model, config)
    prepared = palettizer.prepare(args)
    finalized = palettizer.finalize(backend=graphopt.ExportBackend.CoreAI)
    program = torch.export.export(finalized, args)
    program = program.run_decompositions(coreai_torch.get_decomp_table())
    graphopt.casting.cast_to_16_bit_precision(program)
    path = tmp_path / "m.aimodel"
    coreai_torch.TorchConverter().add_exported_program(program).to_coreai().save_asset(path)
    inputs = dict(zip(program.graph_signature.user_inputs, args, strict=True))
    (found,) = run_asset(path, inputs)
    expected = prepared(*args)
    assert found.dtype is torch.float16
    assert float((found.float() - expected).abs().max() / expected.abs().max()) < 2e-2


@pytest.mark.integration
@pytest.mark.coreml
def test_coremltools_converts_the_finalized_module_to_lookups(tmp_path: Path) -> None:
    import coremltools

    model, args = zoo.MODELS["edsr"]()
    palettizer = KMeansPalettizer(model)
    palettizer.prepare(args)
    finalized = palettizer.finalize(backend=graphopt.ExportBackend.CoreML)
    exported = torch.export.export(finalized, args).run_decompositions({})
    converted = coremltools.convert(
        exported, minimum_deployment_target=coremltools.target.iOS18, skip_model_load=True
    )
    main = converted.get_spec().mlProgram.functions["main"]
    ops = [op.type for op in next(iter(main.block_specializations.values())).operations]
    assert ops.count("constexpr_lut_to_dense") == len(palettizer.summary().palettized) == 11


def test_compressed_program_round_trips_and_is_as_small_as_its_bits() -> None:
    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1024, 1024, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    x = (torch.randn(2, 1024),)
    for bits in (1, 3, 4, 6):
        config = KMeansPalettizerConfig(
            global_config=ModuleKMeansPalettizerConfig(
                op_state_spec={"weight": PalettizationSpec(n_bits=bits)}
            )
        )
        palettizer = KMeansPalettizer(Big(), config)
        palettizer.prepare(x)
        finalized = palettizer.finalize(backend=graphopt.ExportBackend.Torch)
        stream = io.BytesIO()
        torch.export.save(torch.export.export(finalized, x), stream)
        assert stream.tell() < 1024 * 1024 * bits / 8 + 40_000
        stream.seek(0)
        loaded = torch.export.load(stream).module()
        torch.testing.assert_close(loaded(*x), finalized(*x), rtol=0, atol=0)


@pytest.mark.integration
@pytest.mark.parametrize(
    "target", some(["coreai", "coreml", "torch"], lambda name: name == "coreml")
)
def test_module_of_any_kind_is_lowered_in_one_call(target: str, tmp_path: Path) -> None:
    pytest.importorskip({"coreai": "coreai_torch", "coreml": "coremltools"}.get(target, "torch"))
    model, args = zoo.MODELS["edsr"]()
    options = {"precision": "float32"} if target != "torch" else {}
    for source in (model, torch.export.export(model, args)):
        artifact = graphopt.lower(source, target, args, **options)
        artifact.save(tmp_path / f"m{artifact.suffix}", overwrite=True)
        assert artifact.verify(args).max_error < 1e-5
