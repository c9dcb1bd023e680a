import io
import zipfile

import pytest
import torch
from torch import Tensor, nn
from torch._export.serde import serialize
from torch.export import Dim, ExportedProgram

from graphopt.backends.torch_export.quick_saving import quick_saving


class _Net(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        joined = torch.cat([x, y, x[:, ::2]], dim=1)
        return (joined * 2).reshape(x.shape[0] * 2, -1)


@pytest.fixture(scope="module")
def exported() -> ExportedProgram:
    sizes = {0: Dim("batch"), 1: Dim("columns", min=4) * 2}
    example = (torch.randn(3, 12), torch.randn(3, 6))
    shapes = (sizes, {0: sizes[0], 1: Dim("others") * 2})
    return torch.export.export(_Net(), example, dynamic_shapes=shapes, strict=False)


def _texts(exported: ExportedProgram) -> dict[str, bytes]:
    sink = io.BytesIO()
    torch.export.save(exported, sink)
    with zipfile.ZipFile(sink) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.endswith(".json")}


def test_what_is_saved_is_what_torch_saves(
    exported: ExportedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _texts(exported)
    assert any(b"Symbol(" in text for text in expected.values())
    printed = []
    printer = serialize._print_sympy
    monkeypatch.setattr(serialize, "_print_sympy", lambda size: printed.append(1) or printer(size))
    _texts(exported)
    every, before = len(printed), len(printed)
    with quick_saving():
        assert _texts(exported) == expected
    assert len(printed) - before < every / 2


def test_the_canonical_form_that_torch_throws_away_is_not_made(
    exported: ExportedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(serialize, "canonicalize", lambda *given: made.append(given))
    _texts(exported)
    assert len(made) == 1
    with quick_saving():
        _texts(exported)
    assert len(made) == 1


def test_torch_prints_as_before_afterwards() -> None:
    before = serialize._print_sympy, serialize.canonicalize
    failing = quick_saving()
    with pytest.raises(RuntimeError, match="in between"), failing:
        raise RuntimeError("in between")
    assert (serialize._print_sympy, serialize.canonicalize) == before
