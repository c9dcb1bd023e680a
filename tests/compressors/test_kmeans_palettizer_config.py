"""KMeansPalettizer: which weights a config names, and what it says of those it cannot take."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers.palettized_nets import ARGS, EveryOp, X, small, uniform
from torch import Tensor, nn

import graphopt
from graphopt.errors import CompressionError, ConfigError, ConfigWarning
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    OpKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity, PerTensorGranularity


@pytest.mark.slow
@pytest.mark.parametrize("form", ["module", "file"])
def test_configs_by_name_and_type_hold_for_exported_models(form: str, tmp_path: Path) -> None:
    model: object = EveryOp().eval()
    if form == "file":
        torch.export.save(torch.export.export(model, ARGS), tmp_path / "m.pt2")
        model = graphopt.capture(tmp_path / "m.pt2")
    config = KMeansPalettizerConfig(
        global_config=None,
        module_type_configs={
            nn.Conv2d: ModuleKMeansPalettizerConfig(
                op_state_spec={"weight": PalettizationSpec(n_bits=6)}
            )
        },
        module_name_configs={
            "same": None,
            "attention.*": ModuleKMeansPalettizerConfig(
                op_state_spec={"weight": PalettizationSpec(n_bits=2)}
            ),
        },
    )
    palettizer = KMeansPalettizer(model, config)
    palettizer.prepare(ARGS if form == "module" else None)
    assert {row.name: row.n_bits for row in palettizer.summary().palettized} == {
        "conv2.weight": 6,
        "attention.in_proj_weight": 2,
        "attention.out_proj.weight": 2,
    }
    assert "module_name_configs['same'] is None" in palettizer.summary()["same.weight"].detail


def test_one_layer_in_isolation_as_in_the_mixed_precision_workflow() -> None:
    config = KMeansPalettizerConfig(
        global_config=None,
        module_name_configs={
            "0": ModuleKMeansPalettizerConfig(
                op_state_spec={
                    "weight": PalettizationSpec(n_bits=2, granularity=PerTensorGranularity())
                }
            )
        },
    )
    palettizer = KMeansPalettizer(small(), config)
    palettizer.prepare(X)
    assert [row.name for row in palettizer.summary().palettized] == ["0.weight"]
    assert "global_config is None" in palettizer.summary()["2.weight"].detail


@pytest.mark.integration
def test_ops_and_states_can_be_named() -> None:
    six, one = PalettizationSpec(n_bits=6), PalettizationSpec(n_bits=1)
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(
            op_type_config={"embedding": None},
            op_name_config={"conv1d.*": OpKMeansPalettizerConfig(op_state_spec={"weight": six})},
            module_state_spec={"fc.bias": one},
        )
    )
    palettizer = KMeansPalettizer(EveryOp().eval(), config)
    palettizer.prepare(ARGS)
    table = palettizer.summary()
    assert table["conv1.weight"].n_bits == 6
    assert table["embed.weight"].status == "skipped"
    assert table["fc.bias"].n_bits == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            KMeansPalettizerConfig(module_name_configs={"features": None}),
            r"module_name_configs\['features'\] matches nothing.*there are: \['0', '1', '2'\]",
        ),
        (
            KMeansPalettizerConfig(
                global_config=ModuleKMeansPalettizerConfig(op_name_config={"linera": None})
            ),
            r"op_name_config\['linera'\] matches nothing.*closest: linear",
        ),
        (
            KMeansPalettizerConfig(
                global_config=ModuleKMeansPalettizerConfig(
                    module_state_spec={"0.wieght": PalettizationSpec()}
                )
            ),
            r"module_state_spec\['0.wieght'\].*closest: .*0.weight",
        ),
    ],
)
def test_key_that_matches_nothing_is_an_error_with_the_closest_names(
    config: KMeansPalettizerConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        KMeansPalettizer(small(), config).prepare(X)


def test_key_that_matches_nothing_can_be_a_warning() -> None:
    config = KMeansPalettizerConfig(module_name_configs={"features": None})
    palettizer = KMeansPalettizer(small(), config)
    with pytest.warns(ConfigWarning, match="features"):
        palettizer.prepare(X, on_unmatched="warn")
    assert "features" in palettizer.summary().warnings[0]


def test_module_type_that_the_model_lacks_is_a_warning() -> None:
    config = KMeansPalettizerConfig(module_type_configs={nn.Conv2d: None})
    with pytest.warns(ConfigWarning, match=r"Conv2d'\] matches nothing"):
        KMeansPalettizer(small(), config).prepare(X)


def test_small_weights_are_left_alone_on_request() -> None:
    config = KMeansPalettizerConfig(weight_threshold=48)
    palettizer = KMeansPalettizer(small(), config)
    palettizer.prepare(X)
    rows = palettizer.summary()
    assert rows["0.weight"].status == "skipped"  # 48 elements do not exceed 48
    assert "weight_threshold=48" in rows["0.weight"].detail
    assert rows["2.weight"].status == "skipped"


def test_group_size_fallback_warns_and_names_the_layer() -> None:
    spec = PalettizationSpec(granularity=PerGroupedChannelGranularity(group_size=3))
    palettizer = KMeansPalettizer(small(), uniform(spec))
    with pytest.warns(ConfigWarning, match="0.weight: group_size 3 does not divide 8"):
        palettizer.prepare(X)
    assert "does not divide" in palettizer.summary()["0.weight"].note
    assert palettizer.summary()["0.weight"].status == "palettized"


def test_weight_that_cannot_hold_vectors_is_listed_with_the_reason() -> None:
    model = small(width=7)
    palettizer = KMeansPalettizer(model, uniform(PalettizationSpec(cluster_dim=2)))
    with pytest.warns(ConfigWarning, match="0.weight: cluster_dim=2 does not divide the 7"):
        palettizer.prepare(X)
    table = palettizer.summary()
    assert table["0.weight"].status == "skipped"
    assert "cluster_dim=2" in table["0.weight"].detail
    assert table["2.weight"].status == "palettized"


def test_parameter_without_a_compressible_use_is_listed() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.gain = nn.Parameter(torch.randn(2, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.gain

    palettizer = KMeansPalettizer(Scaled())
    palettizer.prepare(X)
    assert "used by mul" in palettizer.summary()["gain"].detail


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_an_error_that_names_it(bad: float) -> None:
    model = small()
    model[2].weight.data[0, 0] = bad
    with pytest.raises(CompressionError, match="2.weight.*NaN or Inf"):
        KMeansPalettizer(model).prepare(X)


def test_conflicting_specs_of_a_tied_weight_are_reported() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    config = KMeansPalettizerConfig(
        module_name_configs={
            "b": ModuleKMeansPalettizerConfig(op_state_spec={"weight": PalettizationSpec(n_bits=2)})
        }
    )
    palettizer = KMeansPalettizer(Twice(), config)
    with pytest.warns(ConfigWarning, match="asks for another spec"):
        palettizer.prepare(X)
    assert len(palettizer.summary().palettized) == 1


def test_skipped_tensors_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    config = KMeansPalettizerConfig(module_name_configs={"0": None})
    with caplog.at_level(logging.INFO, logger="graphopt"):
        KMeansPalettizer(small(), config).prepare(X)
    assert any("left 0.weight as it is" in record.getMessage() for record in caplog.records)
