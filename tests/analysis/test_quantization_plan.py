"""Where activations are quantized: which values, which share a scale, and what stays in float."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import zoo
from helpers.tiers import cases
from torch import Tensor, nn

import graphopt
from graphopt.analysis.quantization_plan import ActivationPlan, plan_activations
from graphopt.config.selection import Selector
from graphopt.ir import op_info
from graphopt.passes import AnnotateQuantization, ConvertQuantization, InsertFakeQuantize
from graphopt.passes.pass_manager import run_passes
from graphopt.quantization import ModuleQuantizerConfig, QuantizationSpec, QuantizerConfig

aten = torch.ops.aten


class Function(nn.Module):
    """A function of tensors with some layers at hand."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function
        self.fc, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Embedding(9, 4)
        self.register_buffer("mask", torch.zeros(4))

    def forward(self, *args: Tensor) -> object:
        return self.function(self, *args)


X, IMAGE = torch.randn(2, 4), torch.randn(2, 3, 8, 8)


def plan(
    function: Callable[..., object],
    *args: Tensor,
    fused: frozenset[str] | None = None,
    integer_results: bool = True,
) -> ActivationPlan:
    """The plan for a target that rounds results, so that what gives them is read as integers."""
    program = graphopt.capture(Function(function).eval(), args)
    return plan_activations(
        program.graph_module,
        Selector(QuantizerConfig()),
        fused,
        integer_results=integer_results,
    )


def groups(found: ActivationPlan) -> dict[str, set[str]]:
    """Group → names of its values, those for one reader as "value>reader"."""
    out: dict[str, set[str]] = {}
    for node, point in found.outputs.items():
        out.setdefault(point.group, set()).add(node.name)
    for (node, position), point in found.inputs.items():
        from graphopt.ir.editor import operands

        operand = operands(node)[position]
        out.setdefault(point.group, set()).add(f"{operand.name}>{node.name}")
    return out


def test_activation_is_rounded_behind_what_is_computed_with_it() -> None:
    found = groups(plan(lambda m, x: F.relu(m.fc(x)), X))
    assert set(found) == {"args_0", "relu"}
    alone = plan(lambda m, x: F.gelu(m.fc(x)), X, fused=frozenset({"relu"}), integer_results=False)
    assert set(groups(alone)) == {"args_0"}
    assert "only gelu reads it" in {name: why for name, _, why in alone.floats}["linear"]


def test_activation_that_others_read_before_is_not_fused() -> None:
    def both(m: Function, x: Tensor) -> Tensor:
        y = m.fc(x)
        return y + F.relu(y)

    found = groups(plan(both, X))
    assert {"linear", "relu"} in found.values()  # relu keeps the grid of what it reads
    assert {"add"} in found.values() or any("add" in str(v) for v in found.values())


def test_operands_of_add_keep_scales_of_their_own() -> None:
    found = groups(plan(lambda m, x: m.fc(x) + m.fc2(x), X))
    assert len(found) == 4  # x, both linears, the sum


def test_operands_of_cat_share_one_scale_with_its_output() -> None:
    found = groups(plan(lambda m, x: torch.cat([m.fc(x), m.fc2(x), x]), X))
    (shared,) = [values for values in found.values() if "cat" in values]
    assert {"linear", "linear_1", "cat"} <= shared
    assert len(shared) == 6  # x too, for each of its readers


@pytest.mark.integration
def test_views_and_pools_hand_the_scale_on() -> None:
    def chain(m: Function, x: Tensor) -> Tensor:
        y = F.max_pool2d(m.conv(x), 2).transpose(1, 2).flatten(1)[:, 4:].reshape(2, -1, 4)
        return m.fc(y)

    found = groups(plan(chain, IMAGE))
    (shared,) = [values for values in found.values() if "conv2d" in values]
    assert {"conv2d", "max_pool2d", "transpose"} <= shared
    assert len(found) == 3


def test_averages_have_a_scale_of_their_own() -> None:
    found = groups(plan(lambda m, x: F.adaptive_avg_pool2d(m.conv(x), 1), IMAGE))
    assert {"conv2d"} in found.values()


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.fc2(m.fc(x)),
        lambda m, x: F.relu(m.fc2(m.fc(x))),
        lambda m, x: m.fc2(m.fc(x)).reshape(4, 2).t(),
        lambda m, x: (m.fc2(m.fc(x)), m.fc2(m.fc(x)).argmax(-1)),
        lambda m, x: m.fc2(m.fc(x)) + m.fc2(x),
        lambda m, x: torch.cat([m.fc2(m.fc(x)), m.fc2(x)]),
    ],
)
def test_results_leave_the_program_in_float(function: Callable[..., object]) -> None:
    found = plan(function, X, integer_results=False)
    assert {node.name for node in found.outputs} <= {"linear", "linear_2"}
    assert all(n.target is aten.linear.default for n, _ in found.inputs)
    assert "leaves the program" in " ".join(why for _, _, why in found.floats)


def test_result_that_a_layer_reads_too_is_rounded_for_both() -> None:
    def both(m: Function, x: Tensor) -> object:
        y = m.fc(x)
        return y, m.fc2(y)

    assert {"linear"} in groups(plan(both, X, integer_results=False)).values()


@pytest.mark.parametrize(
    "behind",
    [
        lambda m, y: y,
        lambda m, y: y.softmax(1),
        lambda m, y: torch.cat([y.flatten(1).sigmoid() * 4.0, y.flatten(1).exp()], 1),
        lambda m, y: F.interpolate(y, scale_factor=2.0, mode="bilinear"),
    ],
)
def test_convolution_that_leads_to_results_alone_gives_floats(
    behind: Callable[..., object],
) -> None:
    def net(m: Function, x: Tensor) -> object:
        return behind(m, m.conv(F.relu(m.conv(x))))

    assert set(groups(plan(net, IMAGE, integer_results=False))) == {"args_0", "relu"}
    assert len(groups(plan(net, IMAGE))) > 2


def test_convolution_gives_integers_where_a_layer_follows() -> None:
    found = groups(plan(lambda m, x: m.conv(m.conv(x).softmax(1)), IMAGE, integer_results=False))
    assert {"conv2d"} in found.values()


def test_config_can_round_results() -> None:
    gm = graphopt.capture(Function(lambda m, x: m.fc(x)).eval(), (X,)).graph_module
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(module_output_spec={"*": QuantizationSpec()})
    )
    found = plan_activations(gm, Selector(config))
    assert {node.name for node in found.outputs} == {"linear"}


def test_views_of_float_values_stay_float() -> None:
    found = groups(plan(lambda m, x: m.fc(m.norm(x).reshape(1, 2, 4)), X))
    assert {"view>linear"} in found.values()
    assert not any("layer_norm" in values for values in found.values())


@pytest.mark.parametrize(
    ("function", "affine"),
    [
        (lambda m, x: F.relu(m.fc(x)), True),
        (lambda m, x: F.silu(m.fc(x)), True),
        (lambda m, x: F.gelu(m.fc(x)), True),
        (lambda m, x: F.hardtanh(m.fc(x), 0.0, 6.0), True),
        (lambda m, x: F.hardtanh(m.fc(x), -1.0, 1.0), False),
        (lambda m, x: torch.tanh(m.fc(x)), False),
        (lambda m, x: F.leaky_relu(m.fc(x)), False),
        (lambda m, x: torch.cat([F.relu(m.fc(x)), torch.sigmoid(m.fc2(x))]), True),
        (lambda m, x: torch.cat([F.relu(m.fc(x)), m.fc2(x)]), False),
    ],
)
def test_values_bounded_below_are_affine(function: Callable[..., object], affine: bool) -> None:
    found = plan(function, X)
    last = list(found.outputs.values())[-1]
    assert (last.spec.qscheme == "asymmetric") == affine


def test_attention_rounds_its_operands_and_not_its_scores() -> None:
    def attention(m: Function, x: Tensor) -> Tensor:
        q, k, v = m.fc(x), m.fc2(x), m.fc(x)
        scores = q @ k.transpose(-1, -2) / 2.0 + m.mask[:2]
        return scores.softmax(-1) @ v

    found = plan(attention, X)
    rounded = {value for values in groups(found).values() for value in values}
    assert "softmax>matmul_1" in rounded
    assert "matmul_1" in rounded
    assert not {"matmul", "div", "add"} & rounded
    probabilities = [p for (n, i), p in found.inputs.items() if n.name == "matmul_1" and i == 0]
    assert probabilities[0].spec.qscheme == "asymmetric"
    fused = plan(lambda m, x: F.scaled_dot_product_attention(m.fc(x), m.fc2(x), x), X)
    assert "scaled_dot_product_attention" in groups(fused)
    assert ("scaled_dot_product_attention", "mask") not in fused.floats


def test_masks_scalars_and_positions_stay_float() -> None:
    found = groups(plan(lambda m, x: m.fc2((m.fc(x) + m.mask) * 2.0), X, integer_results=False))
    assert set(found) == {"args_0", "mul"}

    def angles(m: Function, x: Tensor) -> Tensor:
        positions = torch.arange(2).float()[:, None] * torch.ones(4)
        return m.fc2(m.fc(x) * positions.cos())

    found = groups(plan(angles, X, integer_results=False))
    assert set(found) == {"args_0", "mul_1"}


def test_arithmetic_of_hand_written_norms_stays_float() -> None:
    class RMSNorm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (x + x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = RMSNorm(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(x))

    program = graphopt.capture(Net(), (X,))
    found = plan_activations(program.graph_module, Selector(QuantizerConfig()))
    assert not found.outputs
    assert len(found.inputs) == 1
    assert any("part of RMSNorm" in why for _, _, why in found.floats)


def test_embedding_rows_are_rounded_where_they_are_read() -> None:
    ids = torch.randint(0, 9, (2, 3))
    found = groups(plan(lambda m, i: m.fc(m.table(i)), ids))
    assert "embedding>linear" in found["embedding"]


def test_integers_are_never_rounded() -> None:
    found = plan(lambda m, i: (i + i, m.table(i + 1)), torch.randint(0, 4, (2, 3)))
    assert not found.outputs
    assert not found.inputs


@pytest.mark.integration
def test_plan_is_the_same_every_time() -> None:
    model, args = zoo.MODELS["mobilenet_v3_small"]()
    program = graphopt.capture(model, args)
    first, second = (
        groups(plan_activations(program.graph_module, Selector(QuantizerConfig())))
        for _ in range(2)
    )
    assert first == second


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", cases(["resnet", "bert", "llama"], default=lambda name: name == "bert")
)
def test_annotations_survive_copies_and_passes_hold_their_order(name: str) -> None:
    model, args = zoo.MODELS[name]()
    program = graphopt.capture(model, args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_passes(program.graph_module, [AnnotateQuantization(QuantizerConfig())])
    copied = program.copy().graph_module
    run_passes(copied, [InsertFakeQuantize()])
    count = sum(node.op == "call_module" for node in copied.graph.nodes)
    assert count > 10
    fresh = graphopt.capture(model, args).graph_module
    with pytest.raises(graphopt.errors.PassError, match="annotate-quantization"):
        ConvertQuantization()(fresh)


def test_converting_twice_changes_nothing_more() -> None:
    program = graphopt.capture(nn.Linear(4, 4), (X,))
    gm = program.graph_module
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_input_spec=None, op_output_spec=None)
    )
    assert run_passes(gm, [AnnotateQuantization(config)])
    assert run_passes(gm, [ConvertQuantization()])
    assert not run_passes(gm, [ConvertQuantization()])
    scales = {"x": (torch.tensor([0.1]), None)}
    assert not run_passes(gm, [ConvertQuantization(scales)])


def test_convert_writes_the_ecosystems_ops() -> None:
    gm = graphopt.capture(nn.Linear(4, 4), (X,)).graph_module
    run_passes(gm, [AnnotateQuantization(QuantizerConfig(), integer_results=True)])
    scale = {name: (torch.tensor([0.05]), None) for name in ("input_1", "linear", "x")}
    run_passes(gm, [ConvertQuantization(scale)])
    targets = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
    pair = [
        "quantized_decomposed.quantize_per_tensor.default",
        "quantized_decomposed.dequantize_per_tensor.default",
    ]
    assert targets == [
        *pair,
        "quantized_decomposed.dequantize_per_channel.default",
        "aten.linear.default",
        *pair,
    ]
    assert QuantizationSpec() == QuantizationSpec()


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("op", ["mm", "addmm"])
def test_linear_in_configs_means_products_by_a_turned_matrix(op: str, turned: bool) -> None:
    def product(m: Function, x: Tensor) -> Tensor:
        right = m.fc.weight.t() if turned else m.fc.weight
        return torch.mm(x, right) if op == "mm" else torch.addmm(m.fc.bias, x, right)

    gm = graphopt.capture(Function(product).eval(), (X,)).graph_module
    (node,) = [node for node in gm.graph.nodes if node.target is getattr(aten, op).default]
    assert ("linear" in op_info.op_names(node)) is turned
    # configs that leave linear layers in float leave the product alone only where it is one
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_type_config={"linear": None}),
    )
    found = plan_activations(gm, Selector(config), None, integer_results=True)
    assert ((node, 0) not in found.inputs and node not in found.outputs) is turned
