"""A small net, quantizers of torchao, and what its engine makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

pytest.importorskip("torchao", reason="needs the extra 'torchao'")

from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    Quantizer,
)

aten = torch.ops.aten


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """A residual block, a concatenation, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        z = torch.relu(self.conv(y) + y)
        return self.fc(torch.cat([z, y], 1).mean((2, 3)))


def exported(net: nn.Module) -> Any:
    return torch.export.export(net, (X,)).run_decompositions({}).module()


def converted(net: nn.Module, quantizer: Quantizer, data: list[Tensor], **options: Any) -> Any:
    prepared = prepare_pt2e(exported(net), quantizer)
    with torch.no_grad():
        for batch in data:
            prepared(batch)
    return convert_pt2e(prepared, **options)


def xnnpack() -> Quantizer:
    pytest.importorskip("executorch", reason="needs the extra 'executorch'")
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


def rounding_ops(gm: fx.GraphModule) -> set[tuple[str, tuple[Any, ...]]]:
    """(value that is rounded, scale, zero point and limits)."""
    return {
        (node.args[0].name, (round(float(node.args[1]), 6), *node.args[2:5]))
        for node in gm.graph.nodes
        if "quantize_per_tensor" in str(node.target) and "dequantize" not in str(node.target)
    }
