"""The calibration of a palettizer: its context, what it changes, what it gives back."""

from __future__ import annotations

import pytest
import torch
from helpers.calibrated_palettes import (
    CALIBRATED,
    DATA,
    WEIGHTS,
    assert_same,
    captured,
    config,
    mlp,
    prepared_for,
    state,
)

from graphopt.errors import CalibrationError, InputError, StateError
from graphopt.palettization import (
    KMeansPalettizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")


ALGORITHMS = ("auto", "kmeans", "skm", "gptq")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_original_weights_compute_inside_and_palettes_outside(algorithm: str) -> None:
    model = mlp()
    palettizer, prepared = prepared_for(model, config(algorithm))
    names = list(prepared.state_dict())
    assert not torch.equal(prepared(DATA[0]), model(DATA[0]))
    with palettizer.calibration_mode(progress=False) as calibrator:
        for x in DATA:
            y = prepared(x)
            torch.testing.assert_close(y, model(x), rtol=0, atol=0)
            if algorithm != "kmeans":
                calibrator.step(y)
        with torch.no_grad():
            torch.testing.assert_close(prepared(DATA[0]), model(DATA[0]), rtol=0, atol=0)
        assert list(prepared.state_dict()) == names
    assert list(prepared.state_dict()) == names == list(model.state_dict())
    for name in WEIGHTS:
        assert prepared.state_dict()[name].unique().numel() <= 4, name
    torch.testing.assert_close(
        palettizer.program().graph_module(DATA[1]), prepared(DATA[1]), rtol=0, atol=1e-6
    )


def test_calibrating_changes_the_module_that_prepare_returned() -> None:
    palettizer, prepared = prepared_for(captured())
    before = state(prepared)
    assert palettizer.calibrate(DATA, progress=False) is prepared
    assert any(not torch.equal(prepared.state_dict()[name], before[name]) for name in WEIGHTS)
    assert palettizer.summary()["first.weight"].snr_db > 0


def test_auto_is_gptq_after_a_calibration_and_kmeans_before() -> None:
    _, plain = prepared_for(captured(), config("kmeans"))
    (one, first), (two, second) = (
        prepared_for(captured(), config(each)) for each in ("auto", "gptq")
    )
    for module in (first, second):
        assert_same(state(module), state(plain))
    one.calibrate(DATA, progress=False)
    two.calibrate(DATA, progress=False)
    assert_same(state(first), state(second))


@pytest.mark.parametrize("algorithm", CALIBRATED)
def test_the_callers_model_is_not_changed(algorithm: str) -> None:
    model = mlp()
    before = state(model)
    palettizer, _ = prepared_for(model, config(algorithm))
    palettizer.calibrate(DATA, progress=False)
    palettizer.program()
    assert_same(state(model), before)
    assert all(each.grad is None and each.requires_grad for each in model.parameters())


@pytest.mark.parametrize("algorithm", CALIBRATED)
@pytest.mark.parametrize("calibrated_before", [False, True])
def test_exception_inside_leaves_everything_as_before(
    algorithm: str, calibrated_before: bool
) -> None:
    palettizer, prepared = prepared_for(captured(), config(algorithm))
    if calibrated_before:
        palettizer.calibrate(DATA, progress=False)
    before, code, table = state(prepared), prepared.code, palettizer.summary()
    trained = {name: each.requires_grad for name, each in prepared.named_parameters()}
    output = prepared(DATA[1])

    def interrupted() -> None:
        with palettizer.calibration_mode(progress=False) as calibrator:
            calibrator.step(prepared(DATA[0] + 1))
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        interrupted()
    assert_same(state(prepared), before)
    assert prepared.code == code
    assert palettizer.summary() == table
    assert {name: each.requires_grad for name, each in prepared.named_parameters()} == trained
    torch.testing.assert_close(prepared(DATA[1]), output, rtol=0, atol=0)
    torch.testing.assert_close(
        palettizer.program().graph_module(DATA[1]), output, rtol=0, atol=1e-6
    )


def test_requires_grad_flags_of_the_user_come_back() -> None:
    palettizer, prepared = prepared_for(captured(), config("gptq"))
    prepared.first.weight.requires_grad_(False)
    prepared.head.bias.requires_grad_(False)
    parameters = dict(prepared.named_parameters())
    palettizer.calibrate(DATA, progress=False)
    after = dict(prepared.named_parameters())
    assert {name for name, each in after.items() if not each.requires_grad} == {
        "first.weight",
        "head.bias",
    }
    assert all(after[name] is each for name, each in parameters.items())
    assert all(each.grad is None for each in after.values())


@pytest.mark.parametrize("algorithm", CALIBRATED)
def test_context_without_data_is_refused_and_changes_nothing(algorithm: str) -> None:
    palettizer, prepared = prepared_for(captured(), config(algorithm))
    before = state(prepared)
    with pytest.raises(CalibrationError, match="no data"), palettizer.calibration_mode():
        pass
    with pytest.raises(CalibrationError, match="no data"):
        palettizer.calibrate([], progress=False)
    assert_same(state(prepared), before)


def test_prepare_comes_first() -> None:
    palettizer = KMeansPalettizer(mlp())
    with pytest.raises(StateError, match="prepare"), palettizer.calibration_mode():
        pass
    with pytest.raises(StateError, match="prepare"):
        palettizer.calibrate(DATA)


def test_loss_that_does_not_come_from_the_module_is_refused() -> None:
    palettizer, prepared = prepared_for(captured())
    before = state(prepared)
    with (
        pytest.raises(InputError, match="no gradient"),
        palettizer.calibration_mode(progress=False) as calibrator,
        torch.no_grad(),
    ):
        calibrator.step(prepared(DATA[0]))
    assert_same(state(prepared), before)
