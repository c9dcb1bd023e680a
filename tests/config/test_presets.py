from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from graphopt.config.joint import JointConfig
from graphopt.config.presets import preset, preset_names, preset_text
from graphopt.errors import ConfigError

GUIDE = Path(__file__).parents[2] / "examples" / "guide" / "command_line.md"
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
def test_presets_of_families_have_their_figures_and_the_script_that_made_them(family: str) -> None:
    about = " ".join(line.removeprefix("#").strip() for line in preset_text(family).splitlines())
    assert f"`python tests/benchmarks/presets.py --families {family}`" in about
    measured = re.search(r"([\d.]+) bits per weight.* outputs at ([\d.]+) dB\.", about)
    assert measured
    (row,) = [line for line in GUIDE.read_text().splitlines() if line.startswith(f"| `{family}` |")]
    assert measured[1] in row
    assert f"{measured[2]} dB" in row


def test_unknown_preset_has_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'brt'; did you mean 'bert'\?"):
        preset("brt")
