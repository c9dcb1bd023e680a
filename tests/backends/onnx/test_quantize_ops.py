"""Rounded activations: the runtime computes with integers, without saturating on any CPU."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.base import Artifact
from graphopt.quantization import (
    ModuleQuantizerConfig,
    QuantizationScheme,
    QuantizationSpec,
    Quantizer,
    QuantizerConfig,
)

pytestmark = [pytest.mark.onnx, pytest.mark.integration]


def saved(model: nn.Module, x: Tensor, config: Any, folder: Path) -> Artifact:
    program = graphopt.compress(
        model.eval(), (x,), {"quantization": config}, calibration_data=[x], progress=False
    )
    artifact = graphopt.lower(program, "onnx")
    artifact.save(folder / "net.onnx")
    return artifact


def executed(artifact: Artifact, x: Tensor, folder: Path) -> Counter[str]:
    """Ops that the runtime executed in a call, by its own profile."""
    from graphopt.backends.onnx.check import session_of

    assert artifact.path is not None
    session = session_of(artifact.path, profile=folder / "profile")
    session.run(None, {session.get_inputs()[0].name: x.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [event for event in events if event["name"].endswith("_kernel_time")]
    return Counter(event["args"]["op_name"] for event in nodes)


class Mixed(nn.Module):
    """Convolutions, a sum, products with weights of matrices and of batches, and one of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.rows, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        y = torch.relu(self.second(y) + y).flatten(2).mT
        y = self.rows(y)
        return self.head((y @ y.mT).mean(-1).mean(1, keepdim=True) * y.mean(1))


def test_layers_of_integers_in_front_of_floats_are_computed_with_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    x = torch.randn(6, 8)
    artifact = saved(net, x, {}, tmp_path)
    ran = executed(artifact, x, tmp_path)
    assert ran["QGemm"] == 2
    assert "Gemm" not in ran
    assert artifact.verification is not None
    assert artifact.verification.max_error < 1e-5


def test_the_runtime_fuses_pairs_into_kernels_of_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    artifact = saved(Mixed(), x, {}, tmp_path)
    ran = executed(artifact, x, tmp_path)
    assert ran["QLinearConv"] == 2
    assert ran["QLinearMatMul"] + ran["MatMulIntegerToFloat"] + ran["QGemm"] == 3
    assert not {"Conv", "FusedConv", "MatMul", "Gemm", "MatMulNBits"} & set(ran)
    assert artifact.verification is not None
    assert artifact.verification.max_error < 1e-5


def test_sums_of_the_largest_products_do_not_saturate(tmp_path: Path) -> None:
    """Two products of 255 and 127 are beyond 16 bits, in which kernels without VNNI add up pairs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(8, 64) * torch.linspace(0.5, 1, 8)[:, None])
    x = torch.rand(4, 64) * 0.1 + 0.9
    x[0, 0] = 0.0
    spec = {"dtype": "uint8", "qscheme": "asymmetric"}
    artifact = saved(
        model,
        x,
        {"global_config": {"op_input_spec": {"*": spec}, "op_output_spec": None}},
        tmp_path,
    )
    assert {"MatMulIntegerToFloat", "QGemm", "MatMulInteger"} & set(executed(artifact, x, tmp_path))
    import onnx

    graph = onnx.load(artifact.path).graph
    kinds = {each.name: each.data_type for each in graph.initializer}
    weights = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in kinds]
    assert [kinds[node.input[0]] for node in weights] == [onnx.TensorProto.UINT8]
    assert artifact.verification is not None
    assert artifact.verification.max_error < 1e-6


def test_weights_are_int8_for_cpus_with_vnni_and_mean_the_same(tmp_path: Path) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        torch.randn(2, 3, 7, 7),
    )
    program = graphopt.compress(
        model.eval(), (x,), {"quantization": {}}, calibration_data=[x], progress=False
    )
    path = graphopt.lower(program, "onnx", kernels="vnni").save(tmp_path / "m.onnx", verify=False)
    graph = onnx.load(path).graph
    kinds = {each.name: each.data_type for each in graph.initializer}
    weights = {kinds[n.input[0]] for n in graph.node if n.input[0] in kinds}
    assert weights == {onnx.TensorProto.INT8}
    zeros = {kinds[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"}
    assert zeros == {onnx.TensorProto.UINT8}
    (found,) = ReferenceEvaluator(str(path)).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), program.module()(x), rtol=0, atol=1e-5)


SPECS = {
    "int8": QuantizationSpec(),
    "uint8": QuantizationSpec(dtype="uint8", qscheme=QuantizationScheme.ASYMMETRIC),
    "fp8": QuantizationSpec(dtype="fp8_e4m3"),
    "int4": QuantizationSpec(dtype="int4", qscheme=QuantizationScheme.ASYMMETRIC),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in SPECS])
def test_scales_and_zero_points_are_those_of_the_program(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    given = ModuleQuantizerConfig(op_input_spec={"*": spec}, op_output_spec={"*": spec})
    x = torch.randn(2, 3, 10, 10)
    quantizer = Quantizer(model, QuantizerConfig(global_config=given))
    quantizer.prepare((x,))
    quantizer.calibrate([x])
    artifact = graphopt.lower(quantizer.program(), "onnx")
    artifact.save(tmp_path / "net.onnx")
    assert artifact.verification is not None
    assert artifact.verification.max_error < 1e-6
    if name == "fp8":
        return
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(artifact.path).graph
    held = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    steps = [held[n.input[1]] for n in graph.node if n.op_type == "QuantizeLinear"]
    records = quantizer.summary().activations
    wanted = [np.float32(record.scale) for record in records if record.scale is not None]
    assert sorted(float(step) for step in steps) == sorted(float(scale) for scale in wanted)


class Shrunk(nn.Module):
    """A resize that the runtime would compute with its channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.second(nn.functional.interpolate(y, size=(4, 9), mode="bicubic"))


def test_bicubic_resizes_to_fewer_elements_run_beside_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    artifact = saved(Shrunk(), torch.randn(2, 3, 10, 9), {}, tmp_path)
    assert artifact.verify(torch.randn(1, 3, 10, 9)).holds
