from __future__ import annotations

from pathlib import Path

import pytest
import torch
from search.mixed_precision.nets import encoder, pictures, residual, sentences

import graphopt
from graphopt.errors import ConfigError, LoweringError
from graphopt.mixed_precision import Candidate, analyze, as_candidates
from graphopt.palettization import PalettizationSpec
from graphopt.search.mixed_precision.candidates import read_candidates
from graphopt.search.mixed_precision.configs import config_for, joint_config_for
from graphopt.specs import (
    PerBlockGranularity,
    PerChannelGranularity,
    PerGroupedChannelGranularity,
    PruningSpec,
    QuantizationSpec,
)

KINDS = [
    (4, "4-bit", PalettizationSpec(n_bits=4)),
    ("6-bit", "6-bit", PalettizationSpec(n_bits=6)),
    (
        "4 g16",
        "4-bit g16",
        PalettizationSpec(n_bits=4, granularity=PerGroupedChannelGranularity(group_size=16)),
    ),
    ("8 v4", "8-bit v4", PalettizationSpec(n_bits=8, cluster_dim=4)),
    ("int8", "int8", QuantizationSpec(granularity=PerChannelGranularity())),
    (
        "int4 b32",
        "int4 b32",
        QuantizationSpec(dtype=torch.int4, granularity=PerBlockGranularity(block_size=32)),
    ),
    ("keep", "keep", None),
    (None, "keep", None),
]


@pytest.mark.parametrize(("given", "name", "spec"), KINDS)
def test_short_forms_name_specs(given: object, name: str, spec: object) -> None:
    (found,) = as_candidates([given])  # type: ignore[list-item]
    assert (found.name, found.weight, found.activation) == (name, spec, None)


def test_activations_come_with_weights() -> None:
    (found,) = as_candidates(["int8 a8"])
    assert found.activation == QuantizationSpec()
    assert found.name == "int8, int8 per tensor inputs"


def test_candidates_survive_their_plain_form() -> None:
    lut = PalettizationSpec(n_bits=2, lut_qspec=QuantizationSpec(), enable_per_channel_scale=True)
    given = {
        **{f"c{place}": each for place, (each, _, _) in enumerate(KINDS)},
        "lut": lut,
        "acts": Candidate("acts", None, QuantizationSpec(dtype=torch.uint8)),
    }
    for candidate in as_candidates(given):
        assert Candidate.from_dict(candidate.name, candidate.to_dict()) == candidate


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no candidates"),
        (["5-bot"], "not understood"),
        ([7], "n_bits"),
        ([4, "4-bit"], "several candidates are called"),
        ([{"palettize": {}}], "needs a name"),
        ({"a": {"palettise": {}}}, "give one of"),
        ({"a": {"palettize": {"n_bits": 5}}}, "n_bits"),
        ("4", "must be a sequence"),
    ],
)
def test_what_cannot_be_read_is_said(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_candidates(given)  # type: ignore[arg-type]


def test_activations_have_one_scale() -> None:
    with pytest.raises(ConfigError, match="one scale per tensor"):
        Candidate("a", None, QuantizationSpec(granularity=PerChannelGranularity()))


def test_files_have_candidates_for_all_and_for_some_layers(tmp_path: Path) -> None:
    path = tmp_path / "candidates.yaml"
    path.write_text(
        "candidates: {small: 2, large: {palettize: {n_bits: 6}}}\nlayers: {fc: [4, int8]}\n"
    )
    general, special = read_candidates(path)
    assert [each.name for each in general] == ["small", "large"]
    assert [each.name for each in special["fc"]] == ["4-bit", "int8"]
    path.write_text("layers: {}\n")
    with pytest.raises(ConfigError, match="needs 'candidates'"):
        read_candidates(path)


def test_layers_take_the_last_pattern_that_matches() -> None:
    table = analyze(
        residual(),
        (pictures(1)[0],),
        [2],
        pictures(1),
        layer_candidates={"Conv2d": [4], "conv1": [6, 3], "head.weight": ["int8"]},
    )
    found = {layer.name: layer.candidates for layer in table.layers}
    assert found == {
        "stem.weight": ("4-bit",),
        "conv1.weight": ("6-bit", "3-bit"),
        "conv2.weight": ("4-bit",),
        "side.weight": ("4-bit",),
        "head.weight": ("int8",),
    }


def test_patterns_and_names_are_checked() -> None:
    x = pictures(1)
    with pytest.raises(ConfigError, match="matches no layer; closest: head"):
        analyze(residual(), (x[0],), [2], x, layer_candidates={"heed": [4]})
    with pytest.raises(ConfigError, match="two candidates are called '4-bit'"):
        analyze(residual(), (x[0],), [4], x, layer_candidates={"head": {"4-bit": 6}})


def test_a_candidate_that_does_not_fit_a_shape_is_left_out_there() -> None:
    x = pictures(1)
    table = analyze(residual(), (x[0],), [4, "8 v4"], x)
    found = {layer.name: layer.candidates for layer in table.layers}
    assert found["stem.weight"] == ("4-bit", "8-bit v4")
    assert found["head.weight"] == ("4-bit",)  # 5 output channels


@pytest.mark.coreai
def test_a_backend_refuses_what_it_cannot_hold() -> None:
    x = pictures(1)
    narrow = Candidate("narrow", None, QuantizationSpec(dtype=torch.int4))
    with pytest.raises(LoweringError, match="candidate 'int4 inputs'.*use one of"):
        analyze(residual(), (x[0],), {"fine": 4, "int4 inputs": narrow}, x, backend="coreai")


def test_a_choice_becomes_a_config_that_compresses_exactly_that() -> None:
    x = pictures()
    choice = dict(
        zip(
            ("stem.weight", "conv1.weight", "conv2.weight", "head.weight"),
            as_candidates({"a": 3, "b": "4 g16", "c": "int8", "d": "keep"}),
            strict=True,
        )
    )
    program = graphopt.compress(
        residual(), (x[0],), config_for(choice, {}), correct_statistics=False
    )
    done = {row.name: (row.status, row.n_bits) for row in program.report()}
    assert done["stem.weight"] == ("palettized", 3)
    assert done["conv1.weight"] == ("palettized", 4)
    assert done["conv2.weight"] == ("quantized", 8)
    assert done["head.weight"][0] == done["side.weight"][0] == "skipped"


def test_spec_of_a_scheme_that_no_config_asks_for_is_refused() -> None:
    pruned = Candidate("half", PruningSpec(target_sparsity=0.5))
    with pytest.raises(ConfigError, match=r"stem.weight: no config asks for 'prune'"):
        config_for({"stem.weight": pruned}, {})


def test_activations_without_weights_are_a_config_of_their_own() -> None:
    config = joint_config_for({"stem.weight": Candidate("keep")}, {}, QuantizationSpec())
    assert config.palettization is None
    assert config.quantization is not None
    assert config.quantization.has_activations
    assert config.quantization.global_config.op_state_spec == {"*": None}


def test_tied_weights_are_one_layer() -> None:
    ids = sentences()
    table = analyze(encoder(), (ids[0],), [4], ids)
    names = [layer.name for layer in table.layers]
    assert names == ["embedding.weight", "query.weight", "key.weight", "value.weight"]
    assert len(table.layers[0].nodes) == 2
