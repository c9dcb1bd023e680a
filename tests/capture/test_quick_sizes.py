from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental.sym_node import SymNode

from graphopt.capture.quick_sizes import quick_sizes


class _Arithmetic(nn.Module):
    """Products, quotients, sums, comparisons and extremes of sizes, some replaced by others on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.MaxPool2d(3, 2, 1)
        self.linear = nn.Linear(4, 6)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        pooled = self.pool(torch.relu(self.conv(x)))
        rows = self.linear(pooled.flatten(2).transpose(1, 2))
        joined = torch.cat([y, z, y], dim=1)
        total = y + z  # from here on their sizes are one
        cut = total[:, : max(total.shape[1] // 2, 2)]
        if total.shape[0] + 1 > x.shape[0] * 2:
            cut = cut * 2
        again = torch.cat([total, z], dim=1).reshape(total.shape[0], -1, 2)
        return rows, joined, cut, again, total.expand(x.shape[0], *total.shape)


class _Attention(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = x.view(x.shape[0], x.shape[1], 4, -1).transpose(1, 2)
        scores = heads @ heads.transpose(-1, -2) + mask[:, None, None, :]
        return (scores.softmax(-1) @ heads).transpose(1, 2).reshape(x.shape)


CASES = {
    "arithmetic": (
        _Arithmetic(),
        (torch.randn(3, 3, 20, 26), torch.randn(5, 8), torch.randn(5, 8)),
    ),
    "attention": (_Attention(), (torch.randn(3, 10, 16), torch.randn(3, 10))),
    "recurrent": (nn.GRU(4, 6, batch_first=True), (torch.randn(3, 7, 4),)),
}


def _program(name: str) -> Any:
    model, example = CASES[name]
    shapes = torch.export.ShapesCollection()
    for tensor in example:
        shapes[tensor] = dict.fromkeys(range(tensor.ndim), Dim.AUTO)
    exported = torch.export.export(model.eval(), example, dynamic_shapes=shapes, strict=False)
    values = [node.meta.get("val") for node in exported.graph.nodes]
    known = [(str(v.shape), str(v.stride()), v.dtype) for v in values if isinstance(v, Tensor)]
    ranges = {str(size): str(limits) for size, limits in exported.range_constraints.items()}
    return str(exported.graph), known, ranges, sorted(exported._guards_code)


@pytest.mark.parametrize("name", CASES)
def test_graphs_sizes_ranges_and_guards_are_those_of_torch(name: str) -> None:
    expected = _program(name)
    assert any("s" in shape for shape, _, _ in expected[1])
    with quick_sizes():
        assert _program(name) == expected


def test_an_operation_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    done = []
    multiply = SymNode._mul
    monkeypatch.setattr(SymNode, "_mul", lambda a, b: done.append(1) or multiply(a, b))
    with quick_sizes():
        for _ in range(2):
            env = ShapeEnv()
            size = env.create_unbacked_symint().node
            first, second = size.mul(size), size.mul(size)
            assert (first.expr, second.expr) == (size.expr**2, size.expr**2)
    assert len(done) == 2  # sizes of another program are others, though they have the same names


def test_arithmetic_of_torch_is_as_before_afterwards() -> None:
    before = dict(vars(SymNode))
    failing = quick_sizes()
    with pytest.raises(RuntimeError, match="in between"), failing:
        raise RuntimeError("in between")
    assert dict(vars(SymNode)) == before
