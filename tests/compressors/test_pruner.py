from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiers import cases
from torch import Tensor, nn

import graphopt
from graphopt import pipelines
from graphopt.errors import CompressionError, ConfigError, ConfigWarning, InputError, StateError
from graphopt.numerics.sparsity import block_mask, channel_mask, n_m_mask, unstructured_mask
from graphopt.pruning import (
    BlockStructured,
    ChannelStructured,
    ConstantSparsitySchedule,
    MagnitudePruner,
    MagnitudePrunerConfig,
    ModuleMagnitudePrunerConfig,
    NMStructured,
    PolynomialDecaySchedule,
    PruningSpec,
    Unstructured,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 32)
        self.head = nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(torch.relu(self.fc(y)))


X = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
SCHEMES = [
    Unstructured(),
    ChannelStructured(axis=0),
    BlockStructured(axis=0, block_size=4),
    NMStructured(n=2, m=4, axis=1),
]


def config(spec: PruningSpec, schedule: Any = None) -> MagnitudePrunerConfig:
    inside = ModuleMagnitudePrunerConfig(op_state_spec={"weight": spec}, sparsity_schedule=schedule)
    return MagnitudePrunerConfig(global_config=inside)


# --- masks against their definitions --------------------------------------------------------------
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_unstructured_mask_keeps_the_largest(sparsity: float) -> None:
    weight = torch.randn(7, 5, 3)
    mask = unstructured_mask(weight, sparsity)
    dropped = int(105 * sparsity + 1e-9)
    assert int((~mask).sum()) == dropped
    if 0 < dropped < 105:
        assert weight[~mask].abs().max() <= weight[mask].abs().min()


def test_equal_magnitudes_give_the_asked_number_of_zeros() -> None:
    mask = unstructured_mask(torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0]), 0.6)
    assert mask.tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channel_mask_drops_whole_channels_of_least_magnitude(axis: int) -> None:
    weight = torch.randn(6, 7, 4)
    mask = channel_mask(weight, 0.5, axis)
    others = [place for place in range(3) if place != axis % 3]
    norms = weight.abs().sum(others)
    kept = mask.amax(others)
    assert torch.equal(kept, mask.amin(others))
    assert int((~kept).sum()) == weight.shape[axis] // 2
    assert norms[~kept].max() <= norms[kept].min()


def test_block_mask_is_the_best_of_all_choices_of_blocks() -> None:
    weight = torch.randn(8, 2)
    mask = block_mask(weight, 0.5, 0, 4)
    blocks = weight.reshape(2, 4, 2).square().sum(1).reshape(-1)
    best = min(
        sum(float(blocks[each]) for each in chosen)
        for chosen in itertools.combinations(range(4), 2)
    )
    assert float(weight[~mask].square().sum()) == pytest.approx(best, rel=1e-5)
    assert torch.equal(mask.reshape(2, 4, 2).amax(1), mask.reshape(2, 4, 2).amin(1))


@pytest.mark.parametrize("axis", [0, 1])
def test_n_of_m_drops_the_smallest_of_each_run(axis: int) -> None:
    weight = torch.randn(8, 8, 3)
    mask = n_m_mask(weight, 3, 4, axis)
    runs = weight.movedim(axis, -1).reshape(-1, 4)
    kept = mask.movedim(axis, -1).reshape(-1, 4)
    assert torch.equal(kept.sum(1), torch.ones(len(runs), dtype=torch.int64))
    assert torch.equal(runs.abs().argmax(1), kept.to(torch.uint8).argmax(1))


# --- schedules ---------------------------------------------------------------------------------------
def test_polynomial_schedule_follows_its_formula() -> None:
    cubic = PolynomialDecaySchedule(total_iters=5)
    found = [cubic.compute_sparsity(step, 0.7) for step in range(6)]
    assert found == pytest.approx([0, 0.40469, 0.6125, 0.68906, 0.7, 0.7], abs=1e-5)
    linear = PolynomialDecaySchedule(
        begin_step=2, total_iters=10, power=1, initial_sparsity=0.1, update_frequency=3
    )
    found = [linear.compute_sparsity(step, 0.5) for step in range(12)]
    thirds = [0.1 + 0.4 / 3, 0.1 + 0.8 / 3]
    assert found == pytest.approx([0.1] * 5 + [thirds[0]] * 3 + [thirds[1]] * 3 + [0.5])


def test_constant_schedule_begins_at_its_step() -> None:
    schedule = ConstantSparsitySchedule(begin_step=2)
    assert [schedule.compute_sparsity(step, 0.5) for step in range(4)] == [0, 0, 0.5, 0.5]


def test_masks_follow_the_schedule_in_training() -> None:
    model = Net()
    spec = PruningSpec(target_sparsity=0.75)
    pruner = MagnitudePruner(model, config(spec, PolynomialDecaySchedule(total_iters=4, power=1)))
    prepared = pruner.prepare((X,))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    shares = []
    with pruner.training_mode():
        for _ in range(5):
            mask = prepared.get_submodule("_quantizers.of_fc_weight").mask
            shares.append(1 - float(mask.float().mean()))
            prepared(X).square().mean().backward()
            assert not bool(prepared.fc.weight.grad[~mask].any())
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75, 0.75])
    program = pruner.program()
    assert torch.allclose(program.module()(X), prepared(X), atol=1e-6)
    assert not torch.equal(prepared.fc.weight, model.fc.weight)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_masks_are_chosen_from_the_weights_of_the_time() -> None:
    pruner = MagnitudePruner(
        nn.Sequential(nn.Linear(2, 2, bias=False)),
        config(PruningSpec(), ConstantSparsitySchedule(begin_step=1)),
    )
    prepared = pruner.prepare((torch.randn(1, 2),))
    weight = prepared.get_parameter("0.weight")
    weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    pruner.step()
    assert prepared(torch.ones(1, 2)).tolist() == [[0.0, 7.0]]


# --- the whole way -------------------------------------------------------------------------------------
SUFFIXES = {"coreai": "aimodel", "coreml": "mlpackage", "executorch": "pte", "torch": "pt2"}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("scheme", "target"),
    cases(
        SCHEMES,
        SUFFIXES,
        default=lambda scheme, target: target == "torch" or scheme.type == "unstructured",
    ),
    ids=lambda value: getattr(value, "type", value),
)
def test_pruned_weights_run_on_every_target(scheme: Any, target: str, tmp_path: Path) -> None:
    suffix = SUFFIXES[target]
    pruner = MagnitudePruner(Net().eval(), config(PruningSpec(pruning_scheme=scheme)))
    prepared = pruner.prepare((X,))
    program = pruner.program()
    assert torch.equal(prepared(X), program.module()(X))
    options = {"precision": "float32"} if target == "coreml" else {}
    artifact = graphopt.lower(program, target, **options)
    artifact.save(tmp_path / f"net.{suffix}")
    outcome = artifact.verification
    assert outcome.max_error < 1e-6
    assert outcome.weights == 3
    for row in program.report():
        assert row.status == "pruned"
        # a bit for the mask, half of 32
        assert row.bits_per_weight == pytest.approx(17, abs=0.1)


JOINT = {
    "tables": {"pruning": {}, "palettization": {}},
    "int8 tables": {
        "pruning": {},
        "palettization": {
            "global_config": {
                "op_state_spec": {"weight": {"n_bits": 4, "lut_qspec": {"dtype": "int8"}}}
            }
        },
    },
    "W8A8": {"pruning": {}, "quantization": {}},
    "int4": {
        "pruning": {},
        "quantization": {
            "global_config": {
                "op_state_spec": {"weight": {"dtype": "int4"}},
                "op_input_spec": None,
                "op_output_spec": None,
            }
        },
    },
    "tables and activations": {"pruning": {}, "palettization": {}, "quantization": {}},
}


# each target once with tables and once with integers
RUN = {
    *(("W8A8", "coreai"), ("int4", "coreml"), ("tables", "executorch")),
    ("tables and activations", "coreai"),
}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "target"),
    cases(JOINT, ("coreai", "coreml", "executorch"), default=lambda *case: case in RUN),
)
def test_values_that_stay_are_compressed_and_run(name: str, target: str, tmp_path: Path) -> None:
    suffix = SUFFIXES[target]
    program = pipelines.joint(JOINT[name], [X]).run(Net().eval(), (X,), verify=True)
    options = {"precision": "float32"} if target == "coreml" else {}
    artifact = graphopt.lower(program, target, **options)
    artifact.save(tmp_path / f"net.{suffix}")
    outcome = artifact.verification
    # one step of the last scale where XNNPACK computes with integers
    assert outcome.max_error < (0.02 if target == "executorch" else 1e-6)
    assert outcome.weights == 3
    rows = {row.name: row for row in program.report() if row.status != "skipped"}
    assert set(rows) == {"conv.weight", "fc.weight", "head.weight"}
    assert all("50.0 % zeros, " in row.detail for row in rows.values())
    bits = {"W8A8": 5}.get(name, 3)
    assert rows["conv.weight"].bits_per_weight == pytest.approx(bits, abs=0.5)


@pytest.mark.integration
def test_pruned_int8_weights_are_computed_as_int8_by_xnnpack(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    program = pipelines.joint(JOINT["W8A8"], [X], backend="executorch").run(Net().eval(), (X,))
    artifact = graphopt.lower(program, "executorch")
    artifact.save(tmp_path / "net.pte")
    assert not artifact.delegation.outside  # type: ignore[attr-defined]
    assert artifact.delegation.delegates == 1  # type: ignore[attr-defined]


def test_second_compressor_takes_the_values_of_the_first() -> None:
    from graphopt.palettization import KMeansPalettizer

    pruner = MagnitudePruner(Net().eval())
    pruner.prepare((X,))
    palettizer = KMeansPalettizer(pruner.program())
    palettizer.prepare()
    assert len(palettizer.summary().palettized) == 3
    assert palettizer.summary()["fc.weight"].shape == (32, 16)


def test_pruned_module_of_core_ai_is_raised_again() -> None:
    pytest.importorskip("coreai_torch")
    pruner = MagnitudePruner(Net().eval())
    prepared = pruner.prepare((X,))
    finalized = pruner.finalize(backend=graphopt.ExportBackend.CoreAI)
    assert any("coreai.sparse_to_dense" in str(node.target) for node in finalized.graph.nodes)
    program = pipelines.palettize().run(finalized, (X,))
    assert len(program.report().palettized) == 3
    assert torch.allclose(finalized(X), prepared(X))


# --- what is wrong -----------------------------------------------------------------------------------------
def test_blocks_that_do_not_divide_leave_the_weight_with_a_warning() -> None:
    spec = PruningSpec(pruning_scheme=NMStructured(n=1, m=3, axis=1))
    pruner = MagnitudePruner(Net().eval(), config(spec))
    with pytest.warns(ConfigWarning, match="blocks of 3 do not divide the 8 elements of axis 1"):
        pruner.prepare((X,))
    assert not pruner.summary().pruned


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    model = Net().eval()
    model.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(CompressionError, match=r"fc\.weight: contains NaN or Inf"):
        MagnitudePruner(model).prepare((X,))


def test_calls_at_the_wrong_time_are_refused() -> None:
    pruner = MagnitudePruner(Net())
    with pytest.raises(StateError, match="call prepare"):
        pruner.finalize()
    pruner.prepare((X,))
    with pytest.raises(StateError, match="prepare.. was called before"):
        pruner.prepare((X,))
    with pytest.raises(InputError, match="must come from prepare"):
        pruner.program(Net())


def test_wrong_numbers_in_specs_are_refused() -> None:
    with pytest.raises(ConfigError, match="target_sparsity"):
        PruningSpec(target_sparsity=1.5)
    with pytest.raises(ConfigError, match="n=5 of m=4"):
        NMStructured(n=5, m=4)
    with pytest.raises(ConfigError, match="power"):
        PolynomialDecaySchedule(total_iters=3, power=0)


def test_own_algorithm_is_a_class() -> None:
    class Everything:
        @staticmethod
        def compute_mask(weight: Tensor, sparsity: float, scheme: Any) -> Tensor:
            return torch.zeros_like(weight)

    pruner = MagnitudePruner(Net().eval(), config(PruningSpec(pruning_algo=Everything)))
    prepared = pruner.prepare((X,))
    assert not prepared(X).any()


@pytest.mark.coreml
def test_older_core_ml_refuses_pruned_weights() -> None:
    from graphopt.errors import LoweringError

    pruner = MagnitudePruner(Net().eval())
    pruner.prepare((X,))
    with pytest.raises(LoweringError, match="pruned weights for iOS17"):
        graphopt.lower(pruner.program(), "coreml", minimum_deployment_target="iOS17")


def test_names_that_differ_by_a_dot_keep_masks_of_their_own() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc_1 = nn.Linear(16, 16)
            self.fc = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 8)])

        def forward(self, x: Tensor) -> Tensor:
            return self.fc[1](self.fc[0](self.fc_1(x)))

    x = torch.randn(4, 16)
    pruner = MagnitudePruner(Twins().eval())
    prepared = pruner.prepare((x,))
    masks = [value for key, value in prepared.state_dict().items() if key.endswith("mask")]
    assert len(masks) == 3
    assert torch.allclose(pruner.program().module()(x), prepared(x), atol=1e-6)


def test_training_goes_on_from_a_state_dict() -> None:
    chosen = config(PruningSpec(), PolynomialDecaySchedule(total_iters=6))
    first, second = (MagnitudePruner(Net().eval(), chosen) for _ in range(2))
    mine, theirs = (pruner.prepare((X,)) for pruner in (first, second))
    for _ in range(4):
        with torch.no_grad():
            for weight in mine.parameters():
                weight.add_(torch.randn(weight.shape))
        first.step()
    theirs.load_state_dict(mine.state_dict())
    first.step()
    second.step()
    assert torch.equal(mine(X), theirs(X))
    assert torch.equal(first.program().module()(X), second.program().module()(X))
