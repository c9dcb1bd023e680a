"""What a calibrated palettizer gains in outputs, in every layout and on targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.calibrated_palettes import (
    CALIBRATED,
    DATA,
    assert_same,
    captured,
    config,
    mlp,
    prepared_for,
    state,
    trained,
)
from helpers.tiers import cases
from torch import Tensor, nn

import graphopt
from graphopt.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity
from graphopt.quantization import QuantizationSpec

pytestmark = pytest.mark.usefixtures("one_thread")


# --------------------------------------------------------------------------- fitting outputs
@pytest.mark.parametrize("kind", ["convolution", "mlp"])
def test_fitted_outputs_have_less_error_than_kmeans_at_the_same_size(kind: str) -> None:
    model, x = trained(kind)
    errors, sizes = {}, {}
    for algorithm in ("kmeans", "gptq"):
        palettizer, prepared = prepared_for(model, config(algorithm), (x[:2],))
        if algorithm == "gptq":
            palettizer.calibrate([x[:128], x[128:256]], progress=False)
        with torch.no_grad():
            errors[algorithm] = float((prepared(x[1200:]) - model(x[1200:])).square().mean())
        sizes[algorithm] = sum(row.stored_bits for row in palettizer.summary().palettized)
    assert sizes["gptq"] == sizes["kmeans"]
    assert errors["gptq"] < 0.6 * errors["kmeans"], errors


def test_biases_take_up_the_mean_error_on_request() -> None:
    model = mlp()
    found = {}
    for correct in (False, True):
        palettizer, prepared = prepared_for(model, config("gptq"))
        palettizer.calibrate(DATA, progress=False, correct_bias=correct)
        found[correct] = state(prepared)
    for name, value in model.state_dict().items():
        if name.endswith("bias"):
            assert torch.equal(found[False][name], value), name
            assert not torch.equal(found[True][name], value), name


@pytest.mark.parametrize("algorithm", CALIBRATED)
def test_calibrating_twice_is_calibrating_once(algorithm: str) -> None:
    (one, first), (two, second) = (prepared_for(captured(), config(algorithm)) for _ in range(2))
    one.calibrate(DATA, progress=False)
    two.calibrate([3 * x + 1 for x in DATA], progress=False)
    two.calibrate(DATA, progress=False)
    assert_same(state(first), state(second))
    assert one.summary() == two.summary()
    assert_same(state(one.program().graph_module), state(two.program().graph_module))


def test_biases_of_an_earlier_calibration_do_not_stay() -> None:
    (one, first), (two, second) = (prepared_for(captured(), config("gptq")) for _ in range(2))
    one.calibrate(DATA, progress=False, correct_bias=False)
    two.calibrate(DATA, progress=False)
    two.calibrate(DATA, progress=False, correct_bias=False)
    torch.testing.assert_close(
        two.program().graph_module(DATA[0]), second(DATA[0]), rtol=0, atol=1e-6
    )
    assert_same(state(second), state(first))


@pytest.mark.parametrize(
    "spec",
    [
        PalettizationSpec(n_bits=2, algorithm="gptq", cluster_dim=2),
        PalettizationSpec(n_bits=2, algorithm="gptq", enable_per_channel_scale=True),
        PalettizationSpec(
            n_bits=2, algorithm="gptq", granularity=PerGroupedChannelGranularity(group_size=8)
        ),
        PalettizationSpec(
            n_bits=2,
            algorithm="gptq",
            granularity=PerGroupedChannelGranularity(axis=1, group_size=2),
        ),
    ],
    ids=["vectors", "scales", "groups of rows", "groups of columns"],
)
def test_every_layout_is_fitted_and_stored_as_prepared(spec: PalettizationSpec) -> None:
    setup = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec}),
        module_name_configs={"head": None},
    )
    model = mlp()
    palettizer, prepared = prepared_for(model, setup)
    x = torch.cat(DATA)
    before = (prepared(x) - model(x)).square().mean()
    palettizer.calibrate(DATA, progress=False)
    assert palettizer.summary().warnings == ()
    assert (prepared(x) - model(x)).square().mean() < before
    finalized = palettizer.finalize(backend="torch")
    torch.testing.assert_close(finalized(x), prepared(x), rtol=0, atol=1e-6)


@pytest.mark.coreai
@pytest.mark.parametrize("kind", ["convolution", "mlp"])
def test_fitted_program_runs_in_core_ai(kind: str, tmp_path: Path) -> None:
    model, x = trained(kind)
    palettizer, prepared = prepared_for(model, config("gptq"), (x[:1],))
    palettizer.calibrate([x[:64]], progress=False)
    artifact = graphopt.lower(palettizer.program(), "coreai", precision="float32")
    artifact.save(tmp_path / "net.aimodel")
    assert artifact.verification.max_error < 1e-4
    finalized = palettizer.finalize(backend="coreai")
    torch.testing.assert_close(finalized(x[300:303]), prepared(x[300:303]), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------- files and repetition
class Sum(nn.Module):
    """Two branches that see the same inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def test_a_layer_makes_up_for_what_the_other_side_of_its_sum_lost() -> None:
    torch.manual_seed(0)
    model = Sum().eval()
    x = torch.randn(256, 8)

    def section(n_bits: int) -> ModuleKMeansPalettizerConfig:
        spec = PalettizationSpec(n_bits=n_bits, algorithm="gptq")
        return ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})

    setup = KMeansPalettizerConfig(
        global_config=section(8), module_name_configs={"first": section(1)}
    )
    palettizer, prepared = prepared_for(model, setup, (x[:2],))
    palettizer.calibrate([x])
    with torch.no_grad():
        alone = F.linear(x, prepared.first.weight - model.first.weight)  # type: ignore[union-attr]
        error = prepared(x) - model(x)
    # with a ridge of 0.3 an isotropic input keeps (0.3 / 1.3)² of the error
    assert float(error.var()) < 0.1 * float(alone.var())


class Reader(nn.Module):
    """Words and places, of which a narrow head reads a few directions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(200, 32), nn.Embedding(12, 32)
        self.head = nn.Linear(32, 4, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids) + self.places(torch.arange(ids.shape[1])))


def test_errors_of_embeddings_go_where_nothing_reads_them() -> None:
    torch.manual_seed(0)
    model = Reader().eval()
    chance = 1 / torch.arange(1, 201).float()
    seen, unseen = (
        torch.multinomial(chance, 64 * 12, replacement=True).reshape(64, 12) for _ in range(2)
    )
    errors = {}
    for algorithm in ("kmeans", "gptq"):
        setup = KMeansPalettizerConfig(
            global_config=None,
            module_name_configs={
                name: ModuleKMeansPalettizerConfig(
                    op_state_spec={"weight": PalettizationSpec(n_bits=2, algorithm=algorithm)}
                )
                for name in ("words", "places")
            },
        )
        palettizer, prepared = prepared_for(model, setup, (seen[:2],))
        palettizer.calibrate([seen[:32], seen[32:]])
        with torch.no_grad():
            errors[algorithm] = float((prepared(unseen) - model(unseen)).square().mean())
    assert errors["gptq"] < 0.4 * errors["kmeans"], errors


FORMS: dict[str, dict[str, Any]] = {
    "vectors": {"cluster_dim": 2},
    "int8 tables": {"lut_qspec": QuantizationSpec()},
    "channel scales": {"enable_per_channel_scale": True},
    "groups": {"granularity": PerGroupedChannelGranularity(group_size=4)},
}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("form", "algorithm", "target"),
    cases(
        FORMS,
        CALIBRATED,
        ("coreai", "coreml"),
        default=lambda form, algorithm, target: (target == "coreml") == (algorithm == "skm"),
    ),
)
def test_calibrated_palettes_of_every_form_are_what_the_target_computes(
    form: str, algorithm: str, target: str, tmp_path: Path
) -> None:
    spec = PalettizationSpec(n_bits=2, algorithm=algorithm, **FORMS[form])
    setup = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )
    palettizer, prepared = prepared_for(captured(), setup)
    palettizer.calibrate(DATA)
    program = palettizer.program()
    x = DATA[0][:2]
    torch.testing.assert_close(program.module()(x), prepared(x), rtol=1e-5, atol=1e-6)
    artifact = graphopt.lower(program, target, precision="float32")
    artifact.save(tmp_path / f"net{artifact.suffix}")
    outcome = artifact.verify(x)
    assert outcome.complete
    assert outcome.weights == 3
    assert outcome.max_error < 1e-5
