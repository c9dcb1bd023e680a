from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from search.mixed_precision.nets import encoder, pictures, residual, sentences
from torch import nn
from torch.utils import _pytree as pytree

import graphopt
from graphopt.run.interpreter import Interpreter
from graphopt.run.partial_rerun import PartialRerun, RerunPlan
from graphopt.search.mixed_precision.layers import weights_of

NETS: dict[str, tuple[nn.Module, torch.Tensor]] = {
    "residual": (residual(), pictures(1)[0]),
    "encoder": (encoder(), sentences(1)[0]),
}


def flat(outputs: Any) -> list[torch.Tensor]:
    return pytree.tree_leaves(outputs)


@pytest.mark.parametrize("name", NETS)
def test_a_rerun_from_a_weight_is_the_whole_model_with_that_weight(name: str) -> None:
    model, x = NETS[name]
    plan = RerunPlan(graphopt.capture(model, (x,)).graph_module)
    run = PartialRerun(plan, ((x,), {}))
    for got, want in zip(run.reference(), flat(model(x)), strict=True):
        torch.testing.assert_close(got, want)
    for weight in weights_of(plan.gm):
        below = plan.downstream(weight.nodes)
        run.advance(below.first)
        other = weight.tensor.detach() * 1.1
        changed = copy.deepcopy(model)
        changed.get_parameter(weight.name).data = other
        found = run.outputs(below, dict.fromkeys(below.sources, other))
        for got, want in zip(found, flat(changed(x)), strict=True):
            torch.testing.assert_close(got, want)


def _value(plan: RerunPlan, node: Any) -> torch.Tensor:
    return plan.call(node, lambda each: each).detach()


def test_only_what_depends_on_a_weight_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = NETS["residual"]
    plan = RerunPlan(graphopt.capture(model, (x,)).graph_module)
    calls: Counter[str] = Counter()
    original = Interpreter.call
    sources = [weight.nodes for weight in weights_of(plan.gm) if "head" not in weight.name]

    def counted(self: Interpreter, node: Any, value: Any) -> Any:
        calls[node.name] += node.op == "call_function"
        return original(self, node, value)

    monkeypatch.setattr(Interpreter, "call", counted)
    run = PartialRerun(plan, ((x,), {}))
    for nodes in sources:
        below = plan.downstream(nodes)
        run.advance(below.first)
        for _ in range(10):
            run.outputs(below, dict.fromkeys(nodes, _value(plan, nodes[0])))
    convolutions = [node.name for node in plan.nodes if "conv2d" in str(node.target)]
    # ten times for each weight in or above it, and once for the exact value
    assert [calls[name] for name in convolutions] == [11, 21, 31, 31]


def test_values_that_no_later_weight_needs_are_dropped() -> None:
    model, x = NETS["residual"]
    plan = RerunPlan(graphopt.capture(model, (x,)).graph_module)
    run = PartialRerun(plan, ((x,), {}))
    *_, head = weights_of(plan.gm)
    run.outputs(plan.downstream(head.nodes), dict.fromkeys(head.nodes, head.tensor.detach()))
    run.advance(plan.downstream(head.nodes).first)
    held = {node for node in run._exact if node.op == "call_function"}
    (linear,) = (node for node in plan.nodes if "linear" in str(node.target))
    assert held <= {node for node in plan.nodes if linear in node.users}


def test_gradients_reach_the_weights_of_a_traced_run() -> None:
    model, x = NETS["encoder"]
    plan = RerunPlan(graphopt.capture(model, (x,)).graph_module)
    weight = weights_of(plan.gm)[0]
    leaf = weight.tensor.detach().clone().requires_grad_()
    below = plan.downstream(weight.nodes)
    with torch.enable_grad():
        outputs = PartialRerun(plan, ((x,), {})).traced_outputs(
            below, dict.fromkeys(below.sources, leaf)
        )
        (found,) = torch.autograd.grad(sum(each.square().sum() for each in outputs), leaf)
    exact = copy.deepcopy(model)
    sum(each.square().sum() for each in flat(exact(x))).backward()
    torch.testing.assert_close(found, exact.embedding.weight.grad)
