from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._export.serde import serialize
from torch.export import Dim

from graphopt.capture.quick_loading import quick_loading


class _Sizes(nn.Module):
    """Products, quotients and sums of open sizes, those of one input bound to those of another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        pooled = self.pool(torch.relu(self.conv(x))).flatten(2)
        total = y + z
        return (
            pooled,
            torch.cat([total, z], dim=1).reshape(total.shape[0], -1, 2),
            x.repeat(2, 1, 1, 1),
        )


class _Counted(nn.Module):
    """A size that the data decide."""

    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0] * 2


CASES = {
    "open sizes": (_Sizes(), (torch.randn(3, 3, 20, 26), torch.randn(5, 8), torch.randn(5, 8))),
    "size of the data": (_Counted(), (torch.randn(6),)),
    "fixed sizes": (nn.Linear(4, 3), (torch.randn(2, 4),)),
}


def _file(folder: Path, name: str) -> Path:
    model, example = CASES[name]
    shapes = None
    if name == "open sizes":
        shapes = torch.export.ShapesCollection()
        for tensor in example:
            shapes[tensor] = dict.fromkeys(range(tensor.ndim), Dim.AUTO)
    program = torch.export.export(model.eval(), example, dynamic_shapes=shapes, strict=False)
    torch.export.save(program, folder / "m.pt2")
    return folder / "m.pt2"


def _described(path: Path) -> Any:
    program = torch.export.load(path)
    values = [node.meta.get("val") for node in program.graph.nodes]
    known = [
        (str(value.shape), str(value.stride()), value.dtype, [_hint(size) for size in value.shape])
        for value in values
        if isinstance(value, Tensor)
    ]
    ranges = {str(size): str(limits) for size, limits in program.range_constraints.items()}
    environment = next(
        (
            size.node.shape_env
            for v in values
            if isinstance(v, Tensor)
            for size in v.shape
            if _open(size)
        ),
        None,
    )
    hints = environment and {str(k): v for k, v in environment.backed_var_to_val.items()}
    return str(program.graph), known, ranges, hints, sorted(program._guards_code)


def _open(size: Any) -> bool:
    return isinstance(size, torch.SymInt)


def _hint(size: Any) -> Any:
    return size.node.hint if _open(size) else size


@pytest.mark.parametrize("name", CASES)
def test_programs_are_those_that_torch_reads(name: str, tmp_path: Path) -> None:
    path = _file(tmp_path, name)
    expected = _described(path)
    with quick_loading():
        assert _described(path) == expected
        assert _described(path) == expected  # of a second program nothing is taken from the first


def test_equal_sizes_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file(tmp_path, "open sizes")
    done = []
    parse = serialize.GraphModuleDeserializer._parse_sym_expr

    def counted(self: Any, expression: Any, hint: Any = None) -> Any:
        done.append((str(expression), hint))
        return parse(self, expression, hint)

    monkeypatch.setattr(serialize.GraphModuleDeserializer, "_parse_sym_expr", counted)
    torch.export.load(path)
    slow, done[:] = len(done), []
    with quick_loading():
        torch.export.load(path)
    assert 0 < 3 * len(done) < slow


def test_reading_is_as_before_afterwards() -> None:
    before = serialize.GraphModuleDeserializer._parse_sym_expr
    reading = serialize._dict_to_dataclass
    failing = quick_loading()
    with pytest.raises(RuntimeError, match="in between"), failing:
        raise RuntimeError("in between")
    assert serialize.GraphModuleDeserializer._parse_sym_expr is before
    assert serialize._dict_to_dataclass is reading
