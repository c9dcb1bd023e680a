from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_impls import get_fast_op_impls
from torch.export import Dim

import graphopt
from graphopt.capture.quick_shapes import quick_shapes

_ACTIVATIONS = (
    *(nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-1, 2), nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh()),
    *(nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.GELU("tanh"), nn.LeakyReLU(0.2)),
)


class _Layout(nn.Module):
    def __init__(self, change: Any, layer: nn.Module) -> None:
        super().__init__()
        self.change, self.layer = change, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.change(x))


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 2),
    "sliced": lambda x: x[:, :, ::2],
    "expanded": lambda x: x[:, :, :1].expand(-1, -1, 5, -1),
    "half": lambda x: x.half(),
}


def _values(model: nn.Module, x: Tensor) -> list[tuple[Any, ...]]:
    shapes = ({0: Dim.AUTO, 2: Dim.AUTO},)
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    values = [node.meta.get("val") for node in exported.graph.nodes]
    return [
        (str(value.shape), str(value.stride()), value.dtype, value.device)
        for value in values
        if isinstance(value, Tensor)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_strides_and_types_are_those_of_torch(layout: str) -> None:
    layers = nn.Sequential(*_ACTIVATIONS)
    if layout != "half":
        layers.append(nn.BatchNorm2d(7 if layout == "transposed" else 6))
    model = _Layout(LAYOUTS[layout], layers).eval()
    x = torch.randn(4, 6, 7, 3)
    expected = _values(model, x)
    with quick_shapes():
        assert _values(model, x) == expected


def test_statistics_of_a_norm_are_empty_as_in_torch() -> None:
    norm = torch.ops.aten._native_batch_norm_legit_no_training.default
    of = torch.ones(3)
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def given(mode: FakeTensorMode) -> Any:
        fakes = [mode.from_tensor(t) for t in (torch.randn(2, 3, 4, 5), of, of, of, of)]
        with mode:
            return [(t.shape, t.stride(), t.dtype) for t in norm(*fakes, 0.1, 1e-5)]

    expected = given(FakeTensorMode(shape_env=ShapeEnv()))
    with quick_shapes():
        assert given(FakeTensorMode(shape_env=ShapeEnv())) == expected


def test_rules_of_torch_are_as_before_afterwards() -> None:
    before = dict(get_fast_op_impls())
    graphopt.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.randn(2, 4),))
    failing = quick_shapes()
    with pytest.raises(RuntimeError, match="in between"), failing:
        raise RuntimeError("in between")
    assert get_fast_op_impls() == before
