"""Files of sensitivities, and calibrations that repeat."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.calibrated_palettes import (
    CALIBRATED,
    DATA,
    WEIGHTS,
    Conv,
    assert_same,
    captured,
    config,
    losses,
    mlp,
    prepared_for,
    state,
)
from torch import nn

from graphopt.errors import InputError, StateError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_saved_sensitivities_give_the_palettes_of_their_calibration(tmp_path: Path) -> None:
    path = tmp_path / "made" / "s.safetensors"
    palettizer, prepared = prepared_for(captured(), config("skm"))
    with palettizer.calibration_mode(
        loss_fn=losses("mean"), sensitivity_path=path, progress=False
    ) as calibrator:
        calibrator.step(prepared(DATA[0]), torch.arange(12) % 4)
    again, other = prepared_for(captured(), sensitivity_path=path)
    assert_same(state(other), state(prepared))
    assert again.summary().palettized == palettizer.summary().palettized


def test_saved_sensitivities_do_not_weigh_kmeans_weights(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    palettizer, _ = prepared_for(captured())
    palettizer.calibrate(DATA, progress=False, sensitivity_path=path)
    _, plain = prepared_for(captured(), config("kmeans"))
    _, found = prepared_for(captured(), config("kmeans"), sensitivity_path=path)
    assert_same(state(found), state(plain))


def test_sensitivities_asked_for_but_not_needed_do_not_lose_the_calibration(
    tmp_path: Path,
) -> None:
    (one, first), (two, second) = (prepared_for(captured(), config("gptq")) for _ in range(2))
    one.calibrate(DATA, progress=False)
    two.calibrate(DATA, progress=False, sensitivity_path=tmp_path / "s.safetensors")
    assert_same(state(first), state(second))


def test_sensitivities_of_another_model_are_refused(tmp_path: Path) -> None:
    palettizer, _ = prepared_for(captured())
    with pytest.raises(StateError, match="calibration_mode"):
        palettizer.save_sensitivities(tmp_path / "s.safetensors")
    palettizer.calibrate(DATA, progress=False, sensitivity_path=tmp_path / "s.safetensors")
    other = nn.Sequential(nn.Linear(6, 4)).eval()
    with pytest.raises(InputError, match="no sensitivity for any weight"):
        prepared_for(other, sensitivity_path=tmp_path / "s.safetensors")
    with pytest.raises(InputError, match="missing"):
        prepared_for(captured(), sensitivity_path=tmp_path / "missing.safetensors")


@pytest.mark.parametrize("algorithm", CALIBRATED)
def test_sums_in_mapped_files_give_the_same(algorithm: str, tmp_path: Path) -> None:
    (one, first), (two, second) = (prepared_for(captured(), config(algorithm)) for _ in range(2))
    one.calibrate(DATA, progress=False)
    for _ in range(2):
        two.calibrate(DATA, progress=False, mmap_dir=tmp_path / "sums")
        assert_same(state(first), state(second))
    if algorithm != "gptq":
        sizes = {each.name: each.stat().st_size for each in (tmp_path / "sums").iterdir()}
        model = mlp()
        assert sizes == {f"{n}.f32": 4 * model.state_dict()[n].numel() for n in WEIGHTS}


@pytest.mark.parametrize("algorithm", CALIBRATED)
def test_same_seed_gives_the_same_on_any_number_of_threads(algorithm: str) -> None:
    torch.manual_seed(0)
    model, x = Conv().eval(), torch.randn(8, 2, 8, 8)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            palettizer, prepared = prepared_for(model, config(algorithm), (x[:2],))
            palettizer.calibrate([x[:5], x[5:]], progress=False)
            found.append(state(prepared))
    finally:
        torch.set_num_threads(threads)
    assert_same(found[1], found[0])


@pytest.mark.parametrize("algorithm", CALIBRATED)
def test_half_precision_models_are_calibrated_in_their_type(algorithm: str) -> None:
    model, data = mlp().half(), [x.half() for x in DATA]
    palettizer, prepared = prepared_for(model, config(algorithm, n_bits=3), (data[0][:2],))
    before = state(prepared)
    palettizer.calibrate(data, progress=False)
    found = state(prepared)
    assert all(value.dtype is torch.float16 for value in found.values())
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert any(not torch.equal(found[name], before[name]) for name in WEIGHTS)
    finalized = palettizer.finalize(backend="torch")
    assert finalized(data[0]).dtype is torch.float16
    torch.testing.assert_close(finalized(data[0]), prepared(data[0]), rtol=0, atol=1e-3)
    # the same palettes as the model in single precision, up to rounding
    palettizer, wide = prepared_for(model.float(), config(algorithm, n_bits=3))
    palettizer.calibrate([x.float() for x in data], progress=False)
    x = torch.cat(data)
    torch.testing.assert_close(prepared(x).float(), wide(x.float()), rtol=0.1, atol=0.1)
