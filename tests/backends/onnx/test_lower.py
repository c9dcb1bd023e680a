"""What becomes of a program's interface, sizes, types and size of file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.onnx import backend as onnx_backend
from graphopt.errors import LoweringError, VerificationError

pytestmark = pytest.mark.onnx


class Named(nn.Module):
    """Takes a mapping, numbers and None beside tensors; gives names, its input and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, input: Tensor, given: dict[str, Any], times: int) -> dict[str, Any]:
        y = torch.relu(self.conv(input)) * times + given["shift"]
        return {
            "logits": self.fc(y.mean((2, 3))),
            "class": nn.functional.interpolate(y, scale_factor=2),
            "input": input,
            "any": (y > 0).any(),
        }


def call(batch: int, height: int) -> tuple[Any, ...]:
    return torch.randn(batch, 3, height, 8), {"shift": torch.tensor(0.5)}, 2


@pytest.mark.integration
def test_sizes_stay_open_and_names_are_those_of_the_program(tmp_path: Path) -> None:
    import onnxruntime

    artifact = graphopt.lower(Named().eval(), "onnx", call(1, 8))
    path = artifact.save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(path)
    outputs = [place.name for place in session.get_outputs()]
    assert outputs == ["logits", "out_class", "input_out", "any"]
    first, shift = session.get_inputs()
    assert (first.name, shift.shape) == ("input", [])
    assert [isinstance(size, str) for size in first.shape] == [True, False, True, True]
    assert artifact.verify(*call(3, 6)).max_error < 1e-5


def test_sizes_are_the_examples_where_that_is_asked_for(tmp_path: Path) -> None:
    artifact: Any = graphopt.lower(nn.Linear(4, 3), "onnx", torch.randn(2, 4), dynamic=False)
    artifact.save(tmp_path / "net.onnx")
    assert [list(value.shape) for value in artifact.model.graph.inputs] == [[2, 4]]
    with pytest.raises(VerificationError, match="does not run in ONNX Runtime"):
        artifact.verify(torch.randn(3, 4))


def test_the_file_holds_no_traces_of_where_it_was_made(tmp_path: Path) -> None:
    artifact = graphopt.lower(nn.Linear(4, 3), "onnx", torch.randn(2, 4))
    path = artifact.save(tmp_path / "net.onnx")
    assert b"stack_trace" not in path.read_bytes()
    assert str(Path(__file__).parent).encode() not in path.read_bytes()


def test_unknown_options_are_refused() -> None:
    for option in ({"matmul": "fast"}, {"weights": "dense"}, {"kernels": "fast"}):
        with pytest.raises(LoweringError, match="must be one of"):
            graphopt.lower(nn.Linear(4, 3), "onnx", torch.randn(2, 4), **option)


@pytest.mark.integration
def test_what_is_beyond_a_message_lies_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_backend, "MOST_BYTES", 10_000)
    artifact = graphopt.lower(nn.Linear(64, 128).eval(), "onnx", torch.randn(2, 64))
    path = artifact.save(tmp_path / "net.onnx")
    beside = tmp_path / "net.onnx.data"
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, beside.name]
    assert beside.stat().st_size >= 4 * 64 * 128 > path.stat().st_size
    assert artifact.size == beside.stat().st_size + path.stat().st_size
    assert artifact.verify(torch.randn(5, 64)).max_error < 1e-5
    artifact.save(path, overwrite=True)
    monkeypatch.setattr(onnx_backend, "MOST_BYTES", 2**31)
    artifact.save(path, overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]


@pytest.mark.integration
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_float_types_are_right(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 4)).to(dtype).eval()
    x = torch.randn(3, 8).to(dtype)
    program = graphopt.compress(model, (x,), {"palettization": {}}, progress=False)
    artifact = graphopt.lower(program, "onnx")
    artifact.save(tmp_path / "net.onnx")
    assert artifact.verification is not None
    assert artifact.verification.complete


@pytest.mark.integration
@pytest.mark.parametrize(
    "shapes", ["open", {"input": {0: (1, 4), 2: (4, 16)}}], ids=["open", "bounds"]
)
def test_sizes_asked_for_are_compared_on_other_calls(shapes: Any, tmp_path: Path) -> None:
    program = graphopt.capture(Named().eval(), call(2, 8))
    artifact = graphopt.lower(program, "onnx", shapes=shapes)
    artifact.save(tmp_path / "m.onnx")
    assert artifact.verification.holds
    assert artifact.verification.calls > 2


def test_sizes_that_the_program_fixes_are_not_opened() -> None:
    program = graphopt.capture(Named().eval(), call(2, 8), dynamic_shapes=None)
    with pytest.raises(LoweringError, match="captured with fixed sizes"):
        graphopt.lower(program, "onnx", shapes="open")


class Distances(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        near = nn.functional.pairwise_distance(x, y[: x.shape[0]])
        return torch.cdist(x, y), torch.pdist(y), near


@pytest.mark.integration
def test_composite_ops_without_a_translation_are_broken_up_by_our_rules(tmp_path: Path) -> None:
    call = (torch.randn(3, 4), torch.randn(5, 4))
    artifact = graphopt.lower(Distances(), "onnx", call, dynamic=False)
    artifact.save(tmp_path / "net.onnx")
    assert artifact.verification.max_error < 1e-6


class Losses(nn.Module):
    """Losses of a batch and of one sample, of labels and of shares; rows as often as numbers say."""

    def forward(self, x: Tensor, labels: Tensor, times: Tensor) -> tuple[Tensor, ...]:
        of_one = nn.functional.nll_loss(x[0], labels[0], reduction="none")
        shares = nn.functional.cross_entropy(x, x.softmax(-1), reduction="none")
        whole = nn.functional.cross_entropy(x, labels) + nn.functional.cross_entropy(
            x[1], labels[1]
        )
        return whole, of_one, shares, torch.repeat_interleave(x, times, 0, output_size=6)


@pytest.mark.integration
def test_what_the_exporter_translates_wrongly_is_right(tmp_path: Path) -> None:
    call = (torch.randn(3, 5), torch.tensor([4, 0, 1]), torch.tensor([3, 1, 2]))
    artifact = graphopt.lower(Losses(), "onnx", call, dynamic=False)
    artifact.save(tmp_path / "net.onnx")
    assert artifact.verification.max_error < 1e-6


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.LSTM(4, 5, batch_first=True)
        self.lstm = nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True, proj_size=3)

    def forward(self, x: Tensor) -> Any:
        return self.lstm(self.whole(x)[0])


@pytest.mark.integration
def test_lstms_with_projections_are_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    artifact = graphopt.lower(Projected().eval(), "onnx", (torch.randn(2, 3, 4),), dynamic=False)
    artifact.save(tmp_path / "net.onnx")
    assert artifact.verification.max_error < 1e-6


class Rotated(nn.Module):
    """Queries that are turned by angles, the same for every sequence of a batch, as in decoders."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).unflatten(-1, (2, 8)).transpose(1, 2)
        places = torch.arange(x.shape[1])[None, :, None].float() * torch.arange(1, 5)
        angles = torch.cat([places, places], -1)
        turned = torch.cat([-y[..., 4:], y[..., :4]], -1)
        return y * angles.cos()[:, None] + turned * angles.sin()[:, None]


@pytest.mark.integration
def test_rotary_embeddings_take_batches_that_share_their_angles(tmp_path: Path) -> None:
    artifact: Any = graphopt.lower(Rotated().eval(), "onnx", torch.randn(1, 5, 16))
    artifact.save(tmp_path / "net.onnx")
    assert "RotaryEmbedding" in [node.op_type for node in artifact.model.graph]
    assert artifact.verify(torch.randn(3, 7, 16)).max_error < 1e-5


@pytest.mark.integration
def test_packages_of_the_exporter_warn_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(2, 3, 8)
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).eval()
    graphopt.lower(layer, "onnx", (x, x))
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []
