"""InsertPalettizers, RestoreTraining: what makes a captured graph trainable."""

from __future__ import annotations

import pytest
import torch
from helpers.linear_nets import X, annotate, captured, ops
from torch import nn

import graphopt
from graphopt.errors import CompressionError
from graphopt.ir.captured_module import CapturedModule
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.passes import (
    AnnotatePalettization,
    InsertPalettizers,
    RestoreTraining,
    cluster_annotated,
)
from graphopt.prepared import WeightPalettizer
from graphopt.prepared.state import parts_of

IMAGE = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) + 1


@pytest.fixture
def annotated() -> CapturedModule:
    torch.manual_seed(0)
    gm = captured()
    annotate()(gm)
    return gm


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval()


def test_palettizers_compute_with_the_clustering_that_they_start_from(
    annotated: CapturedModule,
) -> None:
    palettes = cluster_annotated(annotated)
    dense = {name: palette.dense() for name, palette in palettes.items()}
    assert InsertPalettizers(palettes)(annotated).modified
    assert {part.origin.name for part in parts_of(annotated, WeightPalettizer)} == set(dense)
    bias = annotated.state_dict()["fc.bias"]
    hidden = torch.relu(X @ dense["fc.weight"].T + bias)
    torch.testing.assert_close(annotated.eval()(X), hidden @ dense["out.weight"].T)


def test_weights_without_annotation_get_no_palettizer() -> None:
    gm = captured()
    assert not InsertPalettizers({})(gm).modified
    assert parts_of(gm, WeightPalettizer) == []


def test_palettizers_are_inserted_once(annotated: CapturedModule) -> None:
    palettes = cluster_annotated(annotated)
    InsertPalettizers(palettes)(annotated)
    before = ops(annotated)
    assert not InsertPalettizers(palettes)(annotated).modified
    assert ops(annotated) == before
    assert len(parts_of(annotated, WeightPalettizer)) == 2


def test_sparse_outliers_are_refused_by_name() -> None:
    gm = captured()
    config = KMeansPalettizerConfig.model_validate(
        {"global_config": {"op_state_spec": {"weight": {"outlier_fraction": 0.1}}}}
    )
    AnnotatePalettization(config)(gm)
    palettes = cluster_annotated(gm)
    with pytest.raises(CompressionError, match=r"fc\.weight: sparse outliers cannot be trained"):
        InsertPalettizers(palettes)(gm)


def test_norms_and_dropouts_follow_train_and_eval(net: nn.Module) -> None:
    gm = graphopt.capture(net, (IMAGE,)).graph_module
    assert RestoreTraining()(gm).modified
    torch.testing.assert_close(gm.eval()(IMAGE), net(IMAGE), rtol=1e-6, atol=1e-6)
    net[2].p = 0.0
    next(part for part in gm.modules() if isinstance(part, nn.Dropout)).p = 0.0
    torch.testing.assert_close(gm.train()(IMAGE), net.train()(IMAGE), rtol=1e-5, atol=1e-6)
    mean = gm.state_dict()["1.running_mean"]
    torch.testing.assert_close(mean, net[1].running_mean, rtol=1e-5, atol=1e-6)


def test_dropout_keeps_its_rate(net: nn.Module) -> None:
    gm = graphopt.capture(net, (IMAGE,)).graph_module
    RestoreTraining()(gm)
    assert [part.p for part in gm.modules() if isinstance(part, nn.Dropout)] == [0.5]


def test_restoring_again_and_graphs_without_norms_change_nothing(net: nn.Module) -> None:
    gm = graphopt.capture(net, (IMAGE,)).graph_module
    RestoreTraining()(gm)
    assert not RestoreTraining()(gm).modified
    assert not RestoreTraining()(captured()).modified
