"""Artifacts of every target: saved, verified, refused; and outputs compared."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.tables_on_targets import ARGS, TARGETS, palettized

import graphopt
from graphopt.backends import Backend, ExportBackend, load_backend
from graphopt.backends.verification import compare_outputs
from graphopt.errors import ArtifactExistsError, LoweringError, StateError
from graphopt.palettization import (
    PalettizationSpec,
)


@pytest.mark.integration
@pytest.mark.parametrize("target", TARGETS)
def test_saving_refuses_to_overwrite_and_leaves_nothing_behind(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = graphopt.lower(palettized(PalettizationSpec()).program(), target)
    path = tmp_path / f"net{artifact.suffix}"
    with pytest.raises(StateError, match="save the artifact"):
        artifact.verify()
    artifact.save(path)
    size = artifact.size
    with pytest.raises(ArtifactExistsError, match="overwrite=True"):
        artifact.save(path)

    def fail(target_path: Path) -> None:
        target_path.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(artifact, "_write", fail)
        with pytest.raises(OSError, match="disk full"):
            artifact.save(path, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert artifact.size == size
    artifact.save(path, overwrite=True)
    assert artifact.verify().max_error < 1e-2
    with pytest.raises(LoweringError, match="must end in"):
        artifact.save(tmp_path / "net.bin")


@pytest.mark.integration
@pytest.mark.parametrize("target", TARGETS)
def test_verification_notices_another_models_weights(target: str, tmp_path: Path) -> None:
    program = palettized(PalettizationSpec()).program()
    artifact = graphopt.lower(program, target)
    artifact.save(tmp_path / f"net{artifact.suffix}")
    with torch.no_grad():
        program.graph_module.get_buffer("fc.weight_lut").mul_(1.5)
    changed = load_backend(target).check(artifact.path, program, ARGS, {})
    assert changed.max_error > 0.05


@pytest.mark.parametrize("target", TARGETS)
def test_unknown_options_are_refused(target: str) -> None:
    program = palettized(PalettizationSpec()).program()
    with pytest.raises(LoweringError, match="no option"):
        graphopt.lower(program, target, optimise=True)


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(LoweringError, match="no backend 'tflite'"):
        load_backend("tflite")


@pytest.mark.parametrize("target", list(ExportBackend))
def test_backends_load_by_name(target: graphopt.ExportBackend) -> None:
    assert isinstance(load_backend(target), Backend)


@pytest.mark.integration
def test_compressed_program_saves_by_suffix(tmp_path: Path) -> None:
    program = palettized(PalettizationSpec()).program()
    assert program.report()["fc.weight"].n_bits == 4
    path = program.save(tmp_path / "net.pt2")
    again = graphopt.capture(path)
    torch.testing.assert_close(again.graph_module(*ARGS), program.graph_module(*ARGS))
    with pytest.raises(LoweringError, match="no target for '.tflite'"):
        program.save(tmp_path / "net.tflite")


@pytest.mark.parametrize(
    ("found", "wanted", "error"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([math.nan, 1.0], [1.0, 1.0], math.inf),
        ([1.0, 1.0], [math.nan, 1.0], math.inf),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf),
        ([math.nan, math.inf, 1.5], [math.nan, math.inf, 1.0], 0.5),
        ([0.25], [0.0], 0.25),
        ([], [], 0.0),
    ],
)
def test_what_is_not_finite_is_no_agreement(
    found: list[float], wanted: list[float], error: float
) -> None:
    assert compare_outputs([torch.tensor(found)], [torch.tensor(wanted)]) == (error,)
