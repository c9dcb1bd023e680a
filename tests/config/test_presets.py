from __future__ import annotations

import pytest
import yaml

from graphopt.config.joint import JointConfig
from graphopt.config.presets import preset, preset_names, preset_text
from graphopt.errors import ConfigError

FAMILIES = {"cnn", "vit", "bert", "decoder", "super_resolution", "speech"}


def test_every_family_has_one_and_forms_come_first() -> None:
    names = list(preset_names())
    assert names[0] == "w4"
    assert set(names) >= {*FAMILIES, "w8a8", "int8"}
    assert all(about.endswith(".") for about in preset_names().values())


@pytest.mark.parametrize("name", preset_names())
def test_text_of_a_preset_says_all_of_it(name: str) -> None:
    assert JointConfig.from_dict(yaml.safe_load(preset_text(name))) == preset(name)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_presets_of_families_name_the_script_that_measures_them(family: str) -> None:
    assert "tests/benchmarks/presets.py" in preset_text(family)


def test_unknown_preset_has_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'brt'; did you mean 'bert'\?"):
        preset("brt")
