"""Values with which no kernel computes in integers stay in float, and the table says who reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.analysis.activation_plan import ActivationPlan
from graphopt.analysis.quantization_plan import plan_activations
from graphopt.backends import load_backend
from graphopt.config.selection import Selector
from graphopt.ir.editor import operands
from graphopt.quantization import ModuleQuantizerConfig, OpQuantizerConfig, QuantizerConfig

XNNPACK = load_backend("executorch").capabilities


class Net(nn.Module):
    """Layers around which a function of a test runs."""

    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.conv, self.conv2 = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.register_buffer("cos", torch.rand(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


X, IMAGE = torch.randn(2, 5, 8), torch.randn(1, 3, 6, 6)


def plan(
    function: Callable[[Net, Tensor], Tensor],
    x: Tensor = X,
    config: QuantizerConfig | None = None,
    **options: Any,
) -> ActivationPlan:
    program = graphopt.capture(Net(function).eval(), (x,))
    selector = Selector(config or QuantizerConfig())
    return plan_activations(program.graph_module, selector, **options)


def rounded(found: ActivationPlan) -> set[str]:
    """Values that are rounded for all readers, and "value>reader" for one."""
    local = {f"{operands(n)[place].name}>{n.name}" for n, place in found.inputs}
    return {node.name for node in found.outputs} | local


def turned(m: Net, x: Tensor) -> Tensor:
    half = torch.cat([-x[..., 4:], x[..., :4]], -1)
    return x * m.cos + half * m.cos


def attention(m: Net, x: Tensor) -> Tensor:
    q, k, v = turned(m, m.q(x)), turned(m, m.k(x)), m.v(x)
    return m.out(F.scaled_dot_product_attention(q, k, v))


def test_turned_queries_are_rounded_once_where_attention_reads_them() -> None:
    found = plan(attention)
    reasons = {name: why for name, _, why in found.floats}
    assert {"add>scaled_dot_product_attention", "linear_2"} <= rounded(found)
    assert not {"linear", "cat", "mul>add", "mul_1>add"} & rounded(found)
    assert reasons["add"] == "its operand mul is computed in float"
    assert "reads it, which computes in float" in reasons["linear"]


def test_target_without_integer_attention_gets_what_its_layers_need() -> None:
    found = plan(
        attention,
        fused=XNNPACK.fused_activations,
        integer_results=XNNPACK.integer_results,
        float_ops=XNNPACK.float_ops,
    )
    assert not any("scaled_dot" in name for name in rounded(found) - {_RESULT})
    assert {"linear", "linear_1", "linear_2", "x>linear", _RESULT} <= rounded(found)
    reasons = {name: why for name, _, why in found.floats}
    assert "no kernel of scaled_dot_product_attention" in reasons["scaled_dot_product_attention"]


_RESULT = "scaled_dot_product_attention>linear_3"


def test_op_that_a_config_names_is_rounded_all_the_same() -> None:
    named = ModuleQuantizerConfig(op_type_config={"add": OpQuantizerConfig()})
    found = plan(attention, config=QuantizerConfig(global_config=named))
    assert {"mul>add", "mul_1>add"} <= rounded(found)


def test_sums_of_convolutions_are_computed_in_integers() -> None:
    found = plan(lambda m, x: m.conv2(F.relu(m.conv(x) + x)), IMAGE)
    assert {"conv2d", "relu"} <= rounded(found)
    assert "x" in rounded(found) or {"x>conv2d", "x>add"} <= rounded(found)


def test_convolution_gives_integers_to_what_computes_in_float() -> None:
    found = plan(lambda m, x: m.conv2(m.conv(x) * 0.1), IMAGE)
    assert "conv2d" in rounded(found)


def test_sum_with_a_value_that_is_computed_in_float_stays_float() -> None:
    found = plan(lambda m, x: m.conv2(m.conv(x) * 0.1 + m.conv(x)), IMAGE)
    assert not {"mul>add", "mul"} & rounded(found)
    assert "add>conv2d_2" in rounded(found)
