"""Passes on graphs that others have made: they run, or say why they cannot; nothing is done in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.palettized_nets import uniform
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_manager import PassManager

import graphopt
from graphopt import pipelines
from graphopt.errors import InputError
from graphopt.palettization import (
    KMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.passes import AnnotatePalettization, AnnotatePruning, AnnotateQuantization
from graphopt.pruning import MagnitudePrunerConfig
from graphopt.quantization import QuantizerConfig

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def palettes(algorithm: Any) -> KMeansPalettizerConfig:
    return uniform(PalettizationSpec(n_bits=4, algorithm=algorithm))


PIPELINES: dict[str, Callable[[], graphopt.Pipeline]] = {
    "kmeans": lambda: pipelines.palettize(palettes("kmeans")),
    "skm": lambda: pipelines.palettize(palettes("skm"), data=[X]),
    "gptq": lambda: pipelines.palettize(palettes("gptq"), data=[X]),
    "corrected": lambda: pipelines.palettize(palettes("kmeans"), data=[X]),
    "tuned": lambda: pipelines.palettize(palettes("kmeans"), data=[X], tune_steps=2),
    "W8A8": lambda: pipelines.quantize(QuantizerConfig(), data=[X]),
}
GRAPHS: dict[str, Callable[[ExportedProgram], fx.GraphModule]] = {
    "module": lambda exported: exported.module(),
    "decomposed": lambda exported: exported.run_decompositions({}).module(),
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_runs_on_a_graph_of_torch_export(name: str, graph: str) -> None:
    model = net()
    gm = GRAPHS[graph](torch.export.export(model, (X,)))
    PassManager(passes=list(PIPELINES[name]()))(gm)
    want = PIPELINES[name]().run(model, (X,)).module()(X)
    torch.testing.assert_close(gm(X), want, rtol=1e-5, atol=1e-6)
    assert any("to_dense" in str(n.target) or "dequantize" in str(n.target) for n in gm.graph.nodes)


@pytest.mark.parametrize(
    "annotate",
    [
        AnnotatePalettization(KMeansPalettizerConfig()),
        AnnotateQuantization(QuantizerConfig()),
        AnnotatePruning(MagnitudePrunerConfig()),
        *(pipeline() for pipeline in PIPELINES.values()),
    ],
)
def test_graph_that_takes_its_weights_as_inputs_is_refused(annotate: Any) -> None:
    exported = torch.export.export(net(), (X,))
    with pytest.raises(InputError, match=r"exported_program\.module\(\)"):
        annotate(exported.graph_module)


def test_symbolic_trace_is_refused() -> None:
    with pytest.raises(InputError, match=r"torch\.export"):
        pipelines.palettize()(fx.symbolic_trace(net()))


@pytest.mark.executorch
@pytest.mark.integration
def test_passes_among_those_of_executorch_are_refused() -> None:
    pytest.importorskip("executorch")
    from executorch.exir import to_edge_transform_and_lower

    with pytest.raises(Exception, match="RaiseToVocabulary|AnnotatePalettization") as caught:
        to_edge_transform_and_lower(
            torch.export.export(net(), (X,)), transform_passes=list(pipelines.palettize())
        )
    causes = [caught.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)  # type: ignore[arg-type]
    assert isinstance(causes[-1], InputError)


@pytest.mark.executorch
@pytest.mark.integration
def test_compressed_program_goes_through_executorchs_own_lowering() -> None:
    pytest.importorskip("executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    quantized = graphopt.compress(
        net(), (X,), QuantizerConfig(), calibration_data=[X], backend="executorch"
    )
    tables = graphopt.palettization.KMeansPalettizer(net(), palettes("kmeans"))
    tables.prepare((X,))
    finalized = tables.finalize(backend=graphopt.ExportBackend.ExecuTorch)
    for exported, want, limit in (
        (quantized.exported_program, quantized.module()(X), 2e-2),
        (torch.export.export(finalized, (X,)), finalized(X), 1e-5),
    ):
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        buffer = edge.to_executorch().buffer
        (got,) = Runtime.get().load_program(buffer).load_method("forward").execute([X])
        assert float((got - want).abs().max() / want.abs().max()) < limit
