"""Values that only a norm reads stay in float, and the table says of every value what becomes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.analysis.quantization_plan import ActivationPlan, plan_activations
from graphopt.analysis.value_facts import data_values, is_float
from graphopt.config.selection import Selector
from graphopt.ir.editor import operands
from graphopt.quantization import (
    ModuleQuantizerConfig,
    OpQuantizerConfig,
    QuantizationSpec,
    QuantizerConfig,
)

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class RMSNorm(nn.Module):
    """Written out, as transformers has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """Layers around which a function of a test runs."""

    def __init__(self, function: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.fc1, self.fc2, self.fc3 = (nn.Linear(8, 8) for _ in range(3))
        self.norm, self.rms = nn.LayerNorm(8), RMSNorm()
        self.gain = nn.Parameter(torch.full((8,), 0.1))
        self.register_buffer("positions", torch.randn(1, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def plan(
    function: Callable[[Block, Tensor], Tensor], config: QuantizerConfig | None = None
) -> ActivationPlan:
    program = graphopt.capture(Block(function).eval(), (X,))
    return plan_activations(program.graph_module, Selector(config or QuantizerConfig()))


def rounded(found: ActivationPlan) -> set[str]:
    """Values that are rounded for all readers, and "value>reader" for one."""
    local = {f"{operands(n)[place].name}>{n.name}" for n, place in found.inputs}
    return {node.name for node in found.outputs} | local


def test_residual_sum_and_its_branch_stay_float_in_front_of_a_norm() -> None:
    found = plan(lambda m, x: m.fc3(m.norm(x + m.fc2(F.relu(m.fc1(x))))))
    assert rounded(found) == {"x>linear", "relu", "layer_norm>linear_2"}
    reasons = {name: why for name, _, why in found.floats}
    assert "only layer_norm reads it" in reasons["add"]
    assert "only layer_norm reads it" in reasons["linear_1"]


@pytest.mark.parametrize(
    "between",
    [
        lambda m, y: y.reshape(2, 5, 8).to(torch.float32),
        lambda m, y: F.dropout(y, 0.1, training=False),
        lambda m, y: y * m.gain,
        lambda m, y: torch.cat([y, y + 1.0], 1),
        lambda m, y: y.roll(1, 1).mean(1, keepdim=True),
    ],
    ids=["views", "dropout", "layer scale", "cat", "mean"],
)
def test_what_computes_nothing_in_integers_may_stand_between(
    between: Callable[[Block, Tensor], Tensor],
) -> None:
    found = plan(lambda m, x: m.norm(between(m, m.fc1(x))))
    assert rounded(found) == {"x>linear"}


def test_norm_that_is_written_out_counts_by_the_name_of_its_module() -> None:
    found = plan(lambda m, x: m.fc2(m.rms(m.fc1(x))))
    assert "linear" not in rounded(found)
    assert {name: why for name, _, why in found.floats}["linear"].endswith("computes in float")


def test_value_that_an_integer_op_reads_as_well_is_rounded() -> None:
    def both(m: Block, x: Tensor) -> Tensor:
        y = m.fc1(x)
        return m.norm(y) + m.fc2(y)

    assert "linear" in rounded(plan(both))


def test_value_that_is_an_output_as_well_is_rounded_where_results_are() -> None:
    def leaves(m: Block, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + m.fc1(x)
        return m.norm(y), y

    assert "add" not in rounded(plan(leaves))
    gm = graphopt.capture(Block(leaves).eval(), (X,)).graph_module
    found = plan_activations(gm, Selector(QuantizerConfig()), integer_results=True)
    assert "add" in rounded(found)


def test_stream_of_a_pre_norm_network_is_rounded_nowhere() -> None:
    def stream(m: Block, x: Tensor) -> Tensor:
        x = x + m.positions
        x = x + m.fc1(m.norm(x))
        x = x + m.fc2(m.norm(x))
        return m.fc3(m.norm(x))

    found = plan(stream)
    assert not any(name.startswith("add") for name in rounded(found))
    assert {"linear", "linear_1"}.isdisjoint(rounded(found))


def test_batch_norm_is_no_such_norm() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    program = graphopt.capture(net, (torch.randn(2, 3, 8, 8),))
    found = plan_activations(program.graph_module, Selector(QuantizerConfig()))
    assert rounded(found) == {"input_1>conv2d", "relu"}


def test_op_named_in_the_config_is_rounded_all_the_same() -> None:
    named = OpQuantizerConfig(
        op_input_spec={"*": QuantizationSpec()}, op_output_spec={"*": QuantizationSpec()}
    )
    config = QuantizerConfig(global_config=ModuleQuantizerConfig(op_type_config={"add": named}))
    found = plan(lambda m, x: m.norm(x + m.fc1(x)), config)
    assert "add" in rounded(found)


def attention(m: Block, x: Tensor) -> Tensor:
    y = m.norm(x + m.positions)
    scores = torch.softmax(m.fc1(y) @ m.fc2(y).transpose(1, 2) * 0.3, -1)
    y = y + F.gelu(m.fc3(scores @ y)).abs()
    return m.norm(y).mean(1)


@pytest.mark.integration
def test_table_speaks_of_every_float_value() -> None:
    program = graphopt.compress(
        Block(attention).eval(), (X,), QuantizerConfig.presets.w8a8_affine(), [(X,)]
    )
    gm = graphopt.capture(Block(attention).eval(), (X,)).graph_module
    found = plan_activations(gm, Selector(QuantizerConfig()))
    spoken = {name for name, _, _ in found.floats} | {node.name for node in found.outputs}
    spoken |= {operands(node)[place].name for node, place in found.inputs}
    values = {n.name for n in data_values(gm) if n.op == "call_function" and is_float(n)}
    assert values <= spoken
    records = program.report().activations
    assert all(record.detail for record in records if record.status == "float")
    assert all(record.why for record in records if record.status == "quantized")
