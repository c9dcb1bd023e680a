"""Models that are not made of modules and buffers alone, or that change while they run."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import CaptureError, ConfigError, ConfigWarning, InputError
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.palettization.spec import PerGroupedChannelGranularity


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.shape[1] < 10 else self.fc(x) * 2


def test_conditions_on_sizes_hold_for_every_copy_and_for_saved_programs() -> None:
    model, x = Branch().eval(), torch.randn(2, 5, 4)
    program = graphopt.capture(model, (x,))
    wrong = torch.randn(2, 12, 4)
    prepared = KMeansPalettizer(model).prepare((x,))
    for module in (program.graph_module, program.module(), copy.deepcopy(prepared), prepared):
        with pytest.raises(InputError, match="needs L"):
            module(wrong)
        assert module(torch.randn(3, 7, 4)).shape == (3, 7, 4)
    stream = io.BytesIO()
    torch.export.save(program.exported_program, stream)
    stream.seek(0)
    with pytest.raises(AssertionError, match="Guard failed"):
        torch.export.load(stream).module()(wrong)


def test_static_programs_refuse_other_sizes() -> None:
    model, x = Branch().eval(), torch.randn(2, 5, 4)
    exported = torch.export.export(model, (x,))
    for program in (
        graphopt.capture(exported),
        graphopt.capture(model, (x,), dynamic_shapes=None),
    ):
        with pytest.raises(InputError, match=r"size\(\)\[1\] == 5"):
            program.graph_module(torch.randn(2, 12, 4))


def test_plain_tensors_and_constants_are_captured() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.mask = torch.rand(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.mask * torch.tensor([1.0, 2.0, 3.0, 4.0])

    model, x = Plain().eval(), torch.randn(2, 4)
    module = graphopt.capture(model, (x,)).module()
    torch.testing.assert_close(module(x), model(x))
    assert set(module.state_dict()) == set(model.state_dict())


def test_what_forward_writes_is_undone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x += 1
            return self.fc(x) + self.calls

    model, x = Counting().eval(), torch.zeros(2, 4)
    graphopt.capture(model, (x,))
    assert model.calls.tolist() == [0.0]
    assert float(x.sum()) == 0.0


def test_activations_in_matmuls_are_no_weights() -> None:
    class Gram(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.permute(0, 2, 1).unsqueeze(1)
            return y.transpose(2, 3) @ y

    palettizer = KMeansPalettizer(Gram().eval())
    palettizer.prepare((torch.randn(2, 5, 8),))
    assert len(palettizer.summary()) == 0


def test_output_axis_is_followed_through_views() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 4, 6))
            self.mix = nn.Parameter(torch.randn(6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,ij->bj", x @ self.stack[1], self.mix)

    spec = PalettizationSpec(n_bits=1, granularity=PerGroupedChannelGranularity(group_size=1))
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )
    palettizer = KMeansPalettizer(Experts().eval(), config)
    palettizer.prepare((torch.randn(2, 4),))
    assert palettizer.summary()["stack"].n_luts == 6
    assert palettizer.summary()["mix"].n_luts == 5


def test_buffer_in_a_matmul_is_listed_and_palettized_when_named() -> None:
    class Angles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("angles", torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.angles

    x = (torch.randn(2, 4),)
    palettizer = KMeansPalettizer(Angles().eval())
    palettizer.prepare(x)
    assert "name 'angles'" in palettizer.summary()["angles"].detail
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"angles": PalettizationSpec()})
    )
    palettizer = KMeansPalettizer(Angles().eval(), config)
    palettizer.prepare(x)
    assert palettizer.summary()["angles"].status == "palettized"


def test_state_key_that_matches_nothing_is_an_error() -> None:
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"wieght": PalettizationSpec()})
    )
    with pytest.raises(ConfigError, match="wieght.*closest: weight"):
        KMeansPalettizer(Branch().eval(), config).prepare((torch.randn(2, 5, 4),))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


IDS = (torch.randint(0, 40, (1, 6)),)


def test_ties_survive_preparing_and_saving() -> None:
    prepared = KMeansPalettizer(Tied().eval()).prepare(IDS)
    assert prepared.embed.weight is prepared.head.weight
    stream = io.BytesIO()
    torch.export.save(torch.export.export(Tied().eval(), IDS), stream)
    stream.seek(0)
    palettizer = KMeansPalettizer(torch.export.load(stream))
    palettizer.prepare()
    (row,) = palettizer.summary()
    assert {row.name, *row.aliases} == {"embed.weight", "head.weight"}
    assert len(palettizer.finalize(backend="torch").state_dict()) == 2


def test_switching_off_one_end_of_a_tie_is_reported() -> None:
    config = KMeansPalettizerConfig(module_name_configs={"head": None})
    with pytest.warns(ConfigWarning, match="it is tied"):
        KMeansPalettizer(Tied().eval(), config).prepare(IDS)


def test_compressed_weights_are_listed_as_such() -> None:
    first = KMeansPalettizer(Branch().eval())
    first.prepare((torch.randn(2, 5, 4),))
    second = KMeansPalettizer(first.program())
    second.prepare()
    rows = second.summary()
    assert [(row.status, row.note) for row in rows] == [("palettized", "already compressed")]


def test_subnormal_and_huge_weights_are_clustered() -> None:
    from graphopt.schemes.palettize import palettize

    for scale in (1e-44, 1e-36, 1e30):
        weight = torch.randn(64, 64) * scale
        for bits in (2, 6, 8):
            found = palettize(weight, PalettizationSpec(n_bits=bits))
            assert found.sse <= 0.2 * found.energy


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_captured_without_a_warning(kind: type[nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphopt.capture(kind(4, 4, num_layers=2), (torch.ones(3, 2, 4),))


class Talking(nn.Module):
    """Writes to the console, and branches on data or on nothing."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        print("a word", file=sys.stderr)
        return -x if self.branches and bool((x < 0).any()) else x + 1


_FIXED_BATCH = """
import torch, graphopt
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(1, 16, 8))
    def forward(self, x):
        return torch.bmm(x, self.weight)  # no other batch than 1
graphopt.capture(Net().eval(), (torch.randn(1, 5, 16),))
"""


def test_console_shows_nothing_of_a_size_that_cannot_be_open() -> None:
    # in a process of its own, since torch's handler of logs keeps the stream of its start
    words = [sys.executable, "-W", "ignore", "-c", _FIXED_BATCH]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "meta" not in done.stderr


def test_console_shows_what_the_model_says_and_no_failed_export(
    capfd: pytest.CaptureFixture[str],
) -> None:
    graphopt.capture(Talking(branches=False), (torch.ones(2, 4),))
    assert set(capfd.readouterr().err.splitlines()) == {"a word"}
    with pytest.raises(CaptureError, match="Python value"):
        graphopt.capture(Talking(branches=True), (torch.ones(2, 4),))
    assert set(capfd.readouterr().err.splitlines()) <= {"a word"}
