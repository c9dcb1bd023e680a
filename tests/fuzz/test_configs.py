"""Whatever a config holds, reading it gives a config that means the same after writing, or our error."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import yaml
from helpers.fuzz_values import TEMPLATES, broken, odd_values
from helpers.fuzzing import budget, counted
from hypothesis import given
from hypothesis import strategies as st

from graphopt.compressors.options import CompressOptions
from graphopt.config.joint import JointConfig
from graphopt.config.selection import ModuleFrame, Selector, StateUse
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.pruning import MagnitudePrunerConfig
from graphopt.quantization import QuantizerConfig
from graphopt.rdo import RDOConfig
from graphopt.search.mixed_precision.candidates import as_candidates
from graphopt.search.mixed_precision.options import RecipeOptions, SweepOptions

KINDS: dict[str, Any] = {
    "palettization": KMeansPalettizerConfig,
    "quantization": QuantizerConfig,
    "pruning": MagnitudePrunerConfig,
}
JOINT = {name: TEMPLATES[name] for name in KINDS}
USE = StateUse(
    tensor="layer1.fc.weight",
    node="linear_1",
    op_types=("linear",),
    role="weight",
    frames=(ModuleFrame("", "Net"), ModuleFrame("layer1.fc", "torch.nn.modules.linear.Linear")),
)


@pytest.mark.parametrize("name", KINDS)
@budget(25)
@given(data=st.data())
def test_configs_are_read_and_come_back_or_are_refused(name: str, data: st.DataObject) -> None:
    values = data.draw(broken(TEMPLATES[name]))
    kind = KINDS[name]
    with counted(f"config {name}", whole=values == TEMPLATES[name]):
        config = kind.from_dict(values)
        assert kind.from_dict(config.to_dict()) == config
        assert kind.from_yaml(io.StringIO(config.to_yaml())) == config
        assert kind.from_json(io.StringIO(config.to_json())) == config
        Selector(config).select(USE)


@budget(25)
@given(values=broken(JOINT))
def test_joint_configs_are_read_or_refused(values: Any) -> None:
    with counted("config joint", whole=values == JOINT):
        config = JointConfig.from_dict(values)
        again = {name: part and part.to_dict() for name, part in dict(config).items()}
        assert JointConfig.from_dict(again) == config


@budget(25)
@given(values=broken(TEMPLATES["rdo"]))
def test_rdo_configs_are_read_and_come_back_or_are_refused(values: Any) -> None:
    with counted("config rdo", whole=values == TEMPLATES["rdo"]):
        config = RDOConfig.from_dict(values)
        again = RDOConfig.from_yaml(io.StringIO(config.to_yaml()))
        assert again.model_dump() == config.model_dump()


@budget(25)
@given(
    text=st.text(max_size=200) | odd_values().map(lambda value: yaml.dump(value)), flip=st.data()
)
def test_texts_are_read_or_refused(text: str, flip: st.DataObject) -> None:
    if text and flip.draw(st.booleans()):
        place = flip.draw(st.integers(0, len(text) - 1))
        text = (
            text[:place]
            + flip.draw(st.sampled_from("[]{}:,&*!|>%@`'\"\n\t -?#0"))
            + text[place + 1 :]
        )
    for read in (KMeansPalettizerConfig.from_yaml, KMeansPalettizerConfig.from_json):
        with counted("config text"):
            read(io.StringIO(text))


@budget(25)
@given(values=odd_values())
def test_candidates_are_read_or_refused(values: Any) -> None:
    with counted("candidates"):
        for candidate in as_candidates(values):
            plain = json.loads(json.dumps(candidate.to_dict()))
            assert type(candidate).from_dict(candidate.name, plain) == candidate


@budget(25)
@given(
    kind=st.sampled_from([RecipeOptions, SweepOptions, CompressOptions]),
    values=st.dictionaries(
        st.sampled_from(["target_bpw", "target_bytes", "pin", "keep", "seed", "backend", "solver"]),
        odd_values(),
        max_size=3,
    ),
)
def test_options_are_read_or_refused(kind: Any, values: dict[str, Any]) -> None:
    with counted("options"):
        kind.from_dict(values)
