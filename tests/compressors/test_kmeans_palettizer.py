"""KMeansPalettizer: what prepare and finalize make of every kind of weight."""

from __future__ import annotations

import copy
import io
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.palettized_nets import ARGS, EveryOp, X, small, uniform
from torch import Tensor, nn

import graphopt
from graphopt.errors import InputError, StateError
from graphopt.numerics.kmeans1d import cluster_1d
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    PalettizationSpec,
)

WEIGHTS = {
    "conv1.weight": "conv1d",
    "conv2.weight": "conv2d",
    "conv3.weight": "conv3d",
    "same.weight": "conv2d",
    "up2.weight": "conv_transpose2d",
    "up1.weight": "conv_transpose1d",
    "fc.weight": "linear",
    "right": "matmul",
    "turned": "linear",
    "batched": "matmul",
    "add": "addmm",
    "embed.weight": "embedding",
    "attention.in_proj_weight": "linear",
    "attention.out_proj.weight": "linear",
    "lstm.weight_ih_l0": "lstm",
    "lstm.weight_hh_l0": "lstm",
    "gru.weight_ih_l0": "gru",
    "gru.weight_hh_l0": "gru",
}


@pytest.mark.integration
def test_every_kind_of_weight_is_palettized_once() -> None:
    palettizer = KMeansPalettizer(EveryOp().eval())
    prepared = palettizer.prepare(ARGS)
    table = palettizer.summary()
    assert {row.name: row.ops[0] for row in table.palettized} == WEIGHTS
    assert table.skipped == ()
    for name in WEIGHTS:
        assert prepared.state_dict()[name].unique().numel() <= 16, name


@pytest.mark.integration
@pytest.mark.parametrize("backend", ["torch", "coreai"])
def test_finalized_module_computes_what_the_prepared_one_shows(backend: str) -> None:
    if backend == "coreai":
        pytest.importorskip("coreai_torch")
    palettizer = KMeansPalettizer(EveryOp().eval())
    prepared = palettizer.prepare(ARGS)
    finalized = palettizer.finalize(backend=backend)
    others = (torch.randn(3, 4, 19), torch.randint(0, 32, (3, 5)))
    for args in (ARGS, others):
        for mine, theirs in zip(finalized(*args), prepared(*args), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_prepared_weights_are_the_optimal_palettes_of_the_model() -> None:
    model = small()
    prepared = KMeansPalettizer(model, uniform(PalettizationSpec(n_bits=2))).prepare(X)
    for name in ("0.weight", "2.weight"):
        weight = model.state_dict()[name]
        best = cluster_1d(weight.reshape(1, -1), [4], method="exact")[4].dense()
        torch.testing.assert_close(prepared.state_dict()[name], best.reshape(weight.shape))
    assert torch.equal(prepared.state_dict()["0.bias"], model.state_dict()["0.bias"])


@pytest.mark.integration
def test_names_and_signature_are_the_models() -> None:
    model = EveryOp().eval()
    prepared = KMeansPalettizer(model).prepare(ARGS)
    assert set(prepared.state_dict()) == set(model.state_dict())
    assert {n for n, _ in prepared.named_parameters()} == {n for n, _ in model.named_parameters()}
    x, ids = ARGS
    with torch.no_grad():
        by_name, by_place = prepared(x=x, ids=ids), prepared(x, ids)
    assert torch.equal(by_name[0], by_place[0])


def test_the_callers_model_is_never_changed() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    palettizer = KMeansPalettizer(model)
    prepared = palettizer.prepare(X)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1.0)
    prepared(*X).square().sum().backward()
    optimizer.step()
    prepared.half()
    finalized = palettizer.finalize(backend="torch")
    for buffer in [*finalized.buffers(), *finalized.parameters()]:
        buffer.data.zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert value.dtype is torch.float32
    assert all(parameter.grad is None for parameter in model.parameters())


def test_prepared_module_copies_saves_moves_and_runs_without_gradients() -> None:
    prepared = KMeansPalettizer(small()).prepare(X)
    expected = prepared(*X)
    stream = io.BytesIO()
    torch.save(prepared, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for other in (copy.deepcopy(prepared), loaded, prepared.to("cpu").eval()):
        with torch.no_grad():
            torch.testing.assert_close(other(*X), expected, rtol=0, atol=0)
    assert prepared.to(torch.float64)(X[0].double()).dtype is torch.float64


def test_tied_weight_is_palettized_once_for_all_its_users(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 16)
            self.head = nn.Linear(16, 40, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    ids = (torch.randint(0, 40, (1, 6)),)
    palettizer = KMeansPalettizer(Tied().eval())
    prepared = palettizer.prepare(ids)
    (row,) = palettizer.summary().rows
    assert {row.name, *row.aliases} <= {"embed.weight", "head.weight"}
    assert set(row.ops) == {"embedding", "linear"}
    finalized = palettizer.finalize(backend="torch")
    lookups = [n for n in finalized.graph.nodes if "lut_to_dense" in str(n.target)]
    assert len(lookups) == 1
    torch.testing.assert_close(finalized(*ids), prepared(*ids), rtol=0, atol=0)
    assert sum("weight_indices" in name for name in finalized.state_dict()) == 1
    assert "embed.weight" not in finalized.state_dict()


@cache
def palettized_and_exported() -> tuple[KMeansPalettizer, torch.export.ExportedProgram]:
    model = EveryOp().eval()
    palettizer = KMeansPalettizer(model)
    palettizer.prepare(ARGS)
    return palettizer, torch.export.export(model, ARGS)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["exported", "decomposed", "file", "unlifted"])
def test_exported_models_give_the_same_palettes_as_the_module(form: str, tmp_path: Path) -> None:
    direct, exported = palettized_and_exported()
    source: object = exported
    if form == "decomposed":
        source = exported.run_decompositions({})
    if form == "file":
        torch.export.save(exported, tmp_path / "m.pt2")
        source = graphopt.capture(tmp_path / "m.pt2")
    if form == "unlifted":
        source = exported.module()
    palettizer = KMeansPalettizer(source)
    prepared = palettizer.prepare(ARGS if form == "unlifted" else None)
    mine, theirs = palettizer.summary(), direct.summary()
    assert [row.name for row in mine.palettized] == [row.name for row in theirs.palettized]
    for name in WEIGHTS:
        assert mine[name].snr_db == pytest.approx(theirs[name].snr_db, rel=1e-12)
    torch.testing.assert_close(prepared(*ARGS)[0], direct.finalize(backend="torch")(*ARGS)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_keep_their_type(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    x = (X[0].to(dtype),)
    palettizer = KMeansPalettizer(model)
    prepared = palettizer.prepare(x)
    finalized = palettizer.finalize(backend="torch")
    assert finalized(*x).dtype is dtype
    torch.testing.assert_close(finalized(*x), prepared(*x), rtol=0, atol=0)


def test_calls_in_the_wrong_order_are_refused() -> None:
    palettizer = KMeansPalettizer(small())
    with pytest.raises(StateError, match="prepare"):
        palettizer.finalize(backend="torch")
    with pytest.raises(StateError, match="prepare"):
        palettizer.summary()
    palettizer.prepare(X)
    with pytest.raises(StateError, match="called before"):
        palettizer.prepare(X)
    with pytest.raises(InputError, match="got str"):
        KMeansPalettizer("model")


def test_summary_prints_and_counts() -> None:
    palettizer = KMeansPalettizer(small())
    palettizer.prepare(X)
    table = palettizer.summary()
    assert "2 of 2 tensors palettized" in str(table)
    assert table.bits_per_weight == pytest.approx(((48 + 32) * 4 + 2 * 16 * 32) / 80)
    assert table["0.weight"].stored_bits == 48 * 4 + 16 * 32
    assert table.to_dicts()[0]["name"] == "0.weight"


def test_sizes_are_counted_as_the_target_stores_them() -> None:
    palettizer = KMeansPalettizer(small(), uniform(PalettizationSpec(n_bits=3)))
    palettizer.prepare(X)
    neutral, padded = palettizer.summary()["0.weight"], palettizer.summary("coreai")["0.weight"]
    assert neutral.stored_bits == 48 * 3 + 8 * 32
    assert padded.stored_bits == 48 * 4 + 16 * 32
    assert "stored as 4-bit codes" in padded.note
    assert palettizer.summary("coreml")["0.weight"] == neutral


@pytest.mark.integration
def test_same_seed_gives_the_same_tensors_on_any_number_of_threads() -> None:
    model = EveryOp().eval()
    spec = PalettizationSpec(cluster_dim=2, n_bits=2)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(KMeansPalettizer(model, uniform(spec)).prepare(ARGS).state_dict())
    finally:
        torch.set_num_threads(threads)
    for name in WEIGHTS:
        assert torch.equal(found[0][name], found[1][name]), name


def test_palettized_module_can_be_palettized_again_without_touching_what_is_done() -> None:
    first = KMeansPalettizer(small(), KMeansPalettizerConfig(module_name_configs={"2": None}))
    first.prepare(X)
    second = KMeansPalettizer(first.finalize(backend="torch"))
    second.prepare(X)
    table = second.summary()
    assert [row.name for row in table.palettized][-1] == "2.weight"
    assert second.finalize(backend="torch")(*X).shape == (2, 4)
