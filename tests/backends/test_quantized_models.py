"""Quantized networks on every target: executed or read back."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import zoo
from helpers.quantized_targets import digits, quantized_digits, saved
from helpers.tiers import cases
from helpers.together import together
from torch import Tensor, nn

from graphopt.backends.base import Artifact
from graphopt.quantization import (
    Quantizer,
    QuantizerConfig,
)


def psnr(found: Tensor, wanted: Tensor) -> float:
    error = (found.double() - wanted.double()).square().mean()
    return float(10 * torch.log10(wanted.double().abs().max() ** 2 / error.clamp(min=1e-30)))


@pytest.mark.integration
@pytest.mark.parametrize(
    "target", cases(("coreai", "coreml", "executorch"), default=lambda target: target == "coreml")
)
def test_digits_cnn_runs_in_eight_bits(target: str, tmp_path: Path) -> None:
    model, (images, labels), _ = digits()
    quantizer = quantized_digits()
    x = images[:128]
    program = quantizer.program().with_example((x,))
    with torch.no_grad():
        logits = program.graph_module(x)
        kept = (model(x).argmax(1) == logits.argmax(1)).float().mean()
    assert kept > 0.97
    assert (logits.argmax(1) == labels[:128]).float().mean() > 0.9
    artifact = saved(program, target, tmp_path)
    records = quantizer.summary().activations
    # no value that the last layer reads lies more than a step apart
    (step,) = [r.scale for r in records if r.name == "relu_3"]
    moved = step * float(model.out.weight.abs().sum(1).max())
    assert artifact.verification.max_error * float(logits.abs().max()) <= moved


def outside(artifact: Artifact) -> set[str]:
    """Ops with quantized operands that XNNPACK left to portable kernels."""
    left = artifact.delegation.outside  # type: ignore[attr-defined]
    return {op for op in left if any(name in op for name in ("conv", "linear", "addmm", "mm"))}


@pytest.mark.slow
@pytest.mark.executorch
def test_xnnpack_takes_the_whole_digits_cnn(tmp_path: Path) -> None:
    artifact = saved(quantized_digits().program(), "executorch", tmp_path)
    assert artifact.delegation.delegates == 1  # type: ignore[attr-defined]
    assert not artifact.delegation.outside  # type: ignore[attr-defined]
    assert not artifact.delegation.notes  # type: ignore[attr-defined]


@cache
def resnet() -> tuple[Quantizer, tuple[Tensor, ...], nn.Module]:
    """Random weights whose batch norms have seen photographs; calibrated on crops of them."""
    import skimage.data

    model, _ = zoo.MODELS["resnet"]()
    photo = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1).float() / 127.5 - 1
    crops = torch.stack(
        [photo[:, y : y + 64, x : x + 64] for y in range(0, 448, 64) for x in range(0, 448, 64)]
    )
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        model(crops)
    for norm in norms:
        norm.momentum = 0.1
    model.eval()
    quantizer = Quantizer(model)
    quantizer.prepare((crops[:1],))
    quantizer.calibrate(crops[:32].split(8))
    return quantizer, (crops[34:42],), model


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    cases(("coreai", "coreml", "executorch"), default=lambda target: target == "executorch"),
)
def test_resnet_runs_in_eight_bits(target: str, tmp_path: Path) -> None:
    quantizer, x, model = resnet()
    program = quantizer.program().with_example(x)
    artifact = saved(program, target, tmp_path)
    with torch.no_grad():
        wanted = program.graph_module(*x)
    outcome = artifact.verify()
    if target == "executorch":
        from graphopt.backends.executorch.backend import run_program

        assert artifact.path is not None
        found = run_program(artifact.path, x)[0].reshape(wanted.shape)
        assert psnr(found, wanted) > 35
        assert artifact.delegation.delegates == 1  # type: ignore[attr-defined]
        assert not outside(artifact)
    else:
        assert outcome.max_error < 1e-5
    with torch.no_grad():
        assert psnr(wanted, model(*x)) > 20


@pytest.mark.slow
@pytest.mark.executorch
def test_each_layer_on_xnnpack_is_within_one_step(tmp_path: Path) -> None:
    """Side by side: there is nothing that rounding differences could amplify."""
    torch.manual_seed(0)
    layers = {
        "conv": nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
        "strided": nn.Conv2d(8, 16, 3, stride=2),
        "depthwise": nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6()),
        "dilated": nn.Conv2d(8, 8, 3, dilation=2, bias=False),
        "transposed": nn.ConvTranspose2d(8, 4, 2, stride=2),
        "normed": nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.Hardtanh()),
        "pooled": nn.Sequential(nn.Conv2d(8, 8, 1), nn.MaxPool2d(2)),
        "averaged": nn.Sequential(nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "linear": nn.Linear(10, 7),
    }
    model, x = together(
        {name: (layer, (torch.randn(2, 8, 10, 10),)) for name, layer in layers.items()}, layers
    )
    quantizer = Quantizer(model)
    quantizer.prepare(x, backend="executorch")
    quantizer.calibrate([x])
    program = quantizer.program()
    artifact = saved(program, "executorch", tmp_path)
    with torch.no_grad():
        wanted = program.graph_module(*x)
    (output,) = program.graph_module.graph.find_nodes(op="output")
    for place, (name, restored) in enumerate(zip(layers, output.args[0], strict=True)):
        step = restored.args[1]
        error = artifact.verification.outputs[place] * float(wanted[place].abs().max())
        assert error <= 1.01 * step, name
    assert not artifact.delegation.outside  # type: ignore[attr-defined]


@pytest.mark.integration
@pytest.mark.executorch
def test_activation_that_xnnpack_does_not_fuse_is_rounded_before_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)).eval()
    x = torch.randn(4, 8)
    quantizer = Quantizer(model)
    quantizer.prepare((x,), backend="executorch")
    quantizer.calibrate([x])
    artifact = saved(quantizer.program(), "executorch", tmp_path)
    assert artifact.verification.max_error < 0.02
    assert not outside(artifact)


def llama(config: QuantizerConfig) -> tuple[Quantizer, tuple[Tensor, ...], nn.Module]:
    model, args = zoo.MODELS["llama"]()
    quantizer = Quantizer(model, config)
    quantizer.prepare(args)
    return quantizer, args, model


@pytest.mark.slow
@pytest.mark.coreai
@pytest.mark.parametrize("name", ["w4_per_block", "fp8", "mxfp4"])
def test_llama_weights_run_on_core_ai(name: str, tmp_path: Path) -> None:
    config = getattr(QuantizerConfig.presets, name)()
    quantizer, args, model = llama(config)
    program = quantizer.program()
    outcome = saved(program, "coreai", tmp_path).verification
    assert outcome.max_error < 1e-5
    assert outcome.weights >= 15
    with torch.no_grad():
        assert psnr(program.graph_module(*args), model(*args)) > (25 if name == "fp8" else 12)
    if name == "w4_per_block":
        rows = [row for row in quantizer.summary().quantized if "proj" in row.name]
        assert all(f"blocks of 1×{min(32, row.shape[1])}" in row.detail for row in rows)
