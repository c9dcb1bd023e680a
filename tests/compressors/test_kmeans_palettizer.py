from __future__ import annotations

import copy
import io
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import CompressionError, ConfigError, ConfigWarning, InputError, StateError
from graphopt.numerics.kmeans1d import cluster_1d
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    OpKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity, PerTensorGranularity


class EveryOp(nn.Module):
    """One weight for each kind of op that holds weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.conv3 = nn.Conv3d(1, 4, 3, padding=1)
        self.same = nn.Conv2d(16, 16, 3, padding="same")
        self.up2 = nn.ConvTranspose2d(16, 8, 2, 2)
        self.up1 = nn.ConvTranspose1d(8, 4, 2)
        self.fc = nn.Linear(8, 12)
        self.right = nn.Parameter(torch.randn(12, 8))
        self.turned = nn.Parameter(torch.randn(8, 8))
        self.batched = nn.Parameter(torch.randn(2, 8, 8))
        self.bias = nn.Parameter(torch.randn(8))
        self.add = nn.Parameter(torch.randn(8, 8))
        self.embed = nn.Embedding(32, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.gru = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        z = self.conv2(self.conv1(x).unsqueeze(2).expand(-1, -1, 4, -1))
        z = self.up2(self.same(z))
        q = self.up1(z.mean(2))
        w = self.conv3(q.unsqueeze(1).unsqueeze(1)).mean((1, 2))
        h = self.fc(z.mean((2, 3))) @ self.right
        h = F.linear(h, self.turned.t())
        h = torch.addmm(self.bias, h, self.add)
        h = torch.bmm(torch.stack([h, h]), self.batched).sum(0)
        e = self.embed(ids)
        a, _ = self.attention(e, e, e)
        a = self.gru(self.lstm(a)[0])[0]
        return h + a.mean(1), w


ARGS = (torch.randn(1, 4, 16), torch.randint(0, 32, (1, 5)))
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


def uniform(spec: PalettizationSpec) -> KMeansPalettizerConfig:
    return KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )


def small(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4)).eval()


X = (torch.randn(2, 6),)


def test_every_kind_of_weight_is_palettized_once() -> None:
    palettizer = KMeansPalettizer(EveryOp().eval())
    prepared = palettizer.prepare(ARGS)
    table = palettizer.summary()
    assert {row.name: row.ops[0] for row in table.palettized} == WEIGHTS
    assert table.skipped == ()
    for name in WEIGHTS:
        assert prepared.state_dict()[name].unique().numel() <= 16, name


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


@pytest.mark.parametrize("form", ["exported", "decomposed", "file", "unlifted"])
def test_exported_models_give_the_same_palettes_as_the_module(form: str, tmp_path: Path) -> None:
    model = EveryOp().eval()
    direct = KMeansPalettizer(model)
    direct.prepare(ARGS)
    exported = torch.export.export(model, ARGS)
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


@pytest.mark.parametrize("form", ["module", "file"])
def test_configs_by_name_and_type_hold_for_exported_models(form: str, tmp_path: Path) -> None:
    model: object = EveryOp().eval()
    if form == "file":
        torch.export.save(torch.export.export(model, ARGS), tmp_path / "m.pt2")
        model = graphopt.capture(tmp_path / "m.pt2")
    config = KMeansPalettizerConfig(
        global_config=None,
        module_type_configs={
            nn.Conv2d: ModuleKMeansPalettizerConfig(
                op_state_spec={"weight": PalettizationSpec(n_bits=6)}
            )
        },
        module_name_configs={
            "same": None,
            "attention.*": ModuleKMeansPalettizerConfig(
                op_state_spec={"weight": PalettizationSpec(n_bits=2)}
            ),
        },
    )
    palettizer = KMeansPalettizer(model, config)
    palettizer.prepare(ARGS if form == "module" else None)
    assert {row.name: row.n_bits for row in palettizer.summary().palettized} == {
        "conv2.weight": 6,
        "attention.in_proj_weight": 2,
        "attention.out_proj.weight": 2,
    }
    assert "module_name_configs['same'] is None" in palettizer.summary()["same.weight"].detail


def test_one_layer_in_isolation_as_in_the_mixed_precision_workflow() -> None:
    config = KMeansPalettizerConfig(
        global_config=None,
        module_name_configs={
            "0": ModuleKMeansPalettizerConfig(
                op_state_spec={
                    "weight": PalettizationSpec(n_bits=2, granularity=PerTensorGranularity())
                }
            )
        },
    )
    palettizer = KMeansPalettizer(small(), config)
    palettizer.prepare(X)
    assert [row.name for row in palettizer.summary().palettized] == ["0.weight"]
    assert "global_config is None" in palettizer.summary()["2.weight"].detail


def test_ops_and_states_can_be_named() -> None:
    six, one = PalettizationSpec(n_bits=6), PalettizationSpec(n_bits=1)
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(
            op_type_config={"embedding": None},
            op_name_config={"conv1d.*": OpKMeansPalettizerConfig(op_state_spec={"weight": six})},
            module_state_spec={"fc.bias": one},
        )
    )
    palettizer = KMeansPalettizer(EveryOp().eval(), config)
    palettizer.prepare(ARGS)
    table = palettizer.summary()
    assert table["conv1.weight"].n_bits == 6
    assert table["embed.weight"].status == "skipped"
    assert table["fc.bias"].n_bits == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            KMeansPalettizerConfig(module_name_configs={"features": None}),
            r"module_name_configs\['features'\] matches nothing.*there are: \['0', '1', '2'\]",
        ),
        (
            KMeansPalettizerConfig(
                global_config=ModuleKMeansPalettizerConfig(op_name_config={"linera": None})
            ),
            r"op_name_config\['linera'\] matches nothing.*closest: linear",
        ),
        (
            KMeansPalettizerConfig(
                global_config=ModuleKMeansPalettizerConfig(
                    module_state_spec={"0.wieght": PalettizationSpec()}
                )
            ),
            r"module_state_spec\['0.wieght'\].*closest: .*0.weight",
        ),
    ],
)
def test_key_that_matches_nothing_is_an_error_with_the_closest_names(
    config: KMeansPalettizerConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        KMeansPalettizer(small(), config).prepare(X)


def test_key_that_matches_nothing_can_be_a_warning() -> None:
    config = KMeansPalettizerConfig(module_name_configs={"features": None})
    palettizer = KMeansPalettizer(small(), config)
    with pytest.warns(ConfigWarning, match="features"):
        palettizer.prepare(X, on_unmatched="warn")
    assert "features" in palettizer.summary().warnings[0]


def test_module_type_that_the_model_lacks_is_a_warning() -> None:
    config = KMeansPalettizerConfig(module_type_configs={nn.Conv2d: None})
    with pytest.warns(ConfigWarning, match=r"Conv2d'\] matches nothing"):
        KMeansPalettizer(small(), config).prepare(X)


def test_small_weights_are_left_alone_on_request() -> None:
    config = KMeansPalettizerConfig(weight_threshold=48)
    palettizer = KMeansPalettizer(small(), config)
    palettizer.prepare(X)
    rows = palettizer.summary()
    assert rows["0.weight"].status == "skipped"  # 48 elements do not exceed 48
    assert "weight_threshold=48" in rows["0.weight"].detail
    assert rows["2.weight"].status == "skipped"


def test_group_size_fallback_warns_and_names_the_layer() -> None:
    spec = PalettizationSpec(granularity=PerGroupedChannelGranularity(group_size=3))
    palettizer = KMeansPalettizer(small(), uniform(spec))
    with pytest.warns(ConfigWarning, match="0.weight: group_size 3 does not divide 8"):
        palettizer.prepare(X)
    assert "does not divide" in palettizer.summary()["0.weight"].note
    assert palettizer.summary()["0.weight"].status == "palettized"


def test_weight_that_cannot_hold_vectors_is_listed_with_the_reason() -> None:
    model = small(width=7)
    palettizer = KMeansPalettizer(model, uniform(PalettizationSpec(cluster_dim=2)))
    with pytest.warns(ConfigWarning, match="0.weight: cluster_dim=2 does not divide the 7"):
        palettizer.prepare(X)
    table = palettizer.summary()
    assert table["0.weight"].status == "skipped"
    assert "cluster_dim=2" in table["0.weight"].detail
    assert table["2.weight"].status == "palettized"


def test_parameter_without_a_compressible_use_is_listed() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.gain = nn.Parameter(torch.randn(2, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.gain

    palettizer = KMeansPalettizer(Scaled())
    palettizer.prepare(X)
    assert "used by mul" in palettizer.summary()["gain"].detail


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_an_error_that_names_it(bad: float) -> None:
    model = small()
    model[2].weight.data[0, 0] = bad
    with pytest.raises(CompressionError, match="2.weight.*NaN or Inf"):
        KMeansPalettizer(model).prepare(X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_keep_their_type(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    x = (X[0].to(dtype),)
    palettizer = KMeansPalettizer(model)
    prepared = palettizer.prepare(x)
    finalized = palettizer.finalize(backend="torch")
    assert finalized(*x).dtype is dtype
    torch.testing.assert_close(finalized(*x), prepared(*x), rtol=0, atol=0)


def test_conflicting_specs_of_a_tied_weight_are_reported() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    config = KMeansPalettizerConfig(
        module_name_configs={
            "b": ModuleKMeansPalettizerConfig(op_state_spec={"weight": PalettizationSpec(n_bits=2)})
        }
    )
    palettizer = KMeansPalettizer(Twice(), config)
    with pytest.warns(ConfigWarning, match="asks for another spec"):
        palettizer.prepare(X)
    assert len(palettizer.summary().palettized) == 1


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


def test_skipped_tensors_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    config = KMeansPalettizerConfig(module_name_configs={"0": None})
    with caplog.at_level(logging.INFO, logger="graphopt"):
        KMeansPalettizer(small(), config).prepare(X)
    assert any("left 0.weight as it is" in record.getMessage() for record in caplog.records)


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
