from __future__ import annotations

from typing import Any

import pytest

from graphopt.errors import ConfigError
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.quantization import QuantizerConfig

WEIGHT = "global_config.op_state_spec.weight"


@pytest.mark.parametrize(
    ("config", "place", "meant"),
    [
        ({"global_cfg": {}}, "global_cfg", "global_config"),
        (
            {"global_config": {"op_state_spec": {"weight": {"n_bit": 4}}}},
            f"{WEIGHT}.n_bit",
            "n_bits",
        ),
        (
            {"module_name_configs": {"a": {"op_stat_spec": {}}}},
            "module_name_configs.a.op_stat_spec",
            "op_state_spec",
        ),
        (
            {"global_config": {"op_type_config": {"conv2d": {"op_state_sp": {}}}}},
            "global_config.op_type_config.conv2d.op_state_sp",
            "op_state_spec",
        ),
    ],
)
def test_unknown_key_has_the_nearest_of_its_place(
    config: dict[str, Any], place: str, meant: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        KMeansPalettizerConfig.from_dict(config)
    text = f"kmeans_palettization_config.{place}: unknown key; did you mean {meant!r}?"
    assert text in str(caught.value)


def test_key_like_none_has_no_guess() -> None:
    with pytest.raises(ConfigError, match="zzz: unknown key$"):
        QuantizerConfig.from_dict({"zzz": 1})
