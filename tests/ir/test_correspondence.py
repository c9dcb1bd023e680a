from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import graphopt
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.correspondence import Correspondence
from graphopt.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.passes import AnnotatePalettization, PalettizeWeights
from graphopt.passes.pass_manager import run_passes

_aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def captured() -> CapturedModule:
    return graphopt.capture(Net().eval(), (torch.randn(2, 4),)).graph_module


def compressed() -> tuple[CapturedModule, CapturedModule]:
    program = graphopt.capture(Net().eval(), (torch.randn(2, 4),))
    gm = program.copy().graph_module
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(
            op_state_spec={"weight": PalettizationSpec(n_bits=2)}
        )
    )
    run_passes(gm, [AnnotatePalettization(config), PalettizeWeights()])
    return gm, program.graph_module


def linears(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=_aten.linear.default))


def test_a_copy_corresponds_node_by_node() -> None:
    program = graphopt.capture(Net().eval(), (torch.randn(2, 4),))
    other = program.copy().graph_module
    found = Correspondence.by_name(other, program.graph_module)
    expected = list(zip(other.graph.nodes, program.graph_module.graph.nodes, strict=True))
    assert list(found.items()) == expected
    assert found.without_partner() == ((), ())
    assert list(Correspondence.of_copy(other, program.graph_module).items()) == expected


def test_ops_of_a_compressed_graph_have_partners_and_its_tables_have_none() -> None:
    gm, exact = compressed()
    found = Correspondence.by_name(gm, exact)
    assert [found[node] for node in linears(gm)] == linears(exact)
    added, lost = found.without_partner()
    assert {node.target for node in added if node.op == "call_function"} == {
        torch.ops.graphopt.lut_to_dense.default
    }
    assert {str(node.target) for node in lost} == {"first.weight", "second.weight"}
    assert all(node not in found for node in added)


def test_what_rounds_a_value_shares_its_partner() -> None:
    exact = captured()
    gm = captured()
    relu = next(node for node in gm.graph.nodes if node.target is _aten.relu.default)
    gm.add_module("rounding", nn.Identity())
    with gm.graph.inserting_after(relu):
        rounding = gm.graph.call_module("rounding", (relu,))
    alone = Correspondence.by_name(gm, exact)
    assert rounding not in alone
    assert alone.without_partner() == ((rounding,), ())
    shared = Correspondence.by_name(gm, exact, stands_for=lambda node: node.all_input_nodes[0])
    assert shared[rounding] is shared[relu]
    assert shared.back(shared[relu]) == (relu, rounding)


def test_a_constant_that_became_an_op_of_its_name_has_no_partner() -> None:
    exact, gm = captured(), captured()
    weight = next(node for node in gm.graph.find_nodes(op="get_attr"))
    with gm.graph.inserting_after(weight):
        made = gm.graph.call_function(_aten.neg.default, (weight,))
    weight.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    name = weight.name
    weight.name = "before"
    made.name = name
    found = Correspondence.by_name(gm, exact)
    assert made not in found
    assert weight not in found


def test_graphs_with_other_names_correspond_by_place() -> None:
    first, second = captured(), captured()
    for number, node in enumerate(second.graph.nodes):
        node.name = f"other_{number}"
    assert not Correspondence.by_name(first, second)
    found = Correspondence.by_place(
        first, second, lambda node: "op" if node.target is _aten.linear.default else None
    )
    assert list(found.items()) == list(zip(linears(first), linears(second), strict=True))


def test_places_that_only_one_graph_has_are_left_out() -> None:
    first, second = captured(), captured()
    extra = linears(second)[-1]
    with second.graph.inserting_after(extra):
        second.graph.call_function(_aten.linear.default, extra.args)
    found = Correspondence.by_place(
        first, second, lambda node: "op" if node.target is _aten.linear.default else None
    )
    assert list(found.values()) == linears(second)[:2]


def test_graphs_of_different_length_are_no_copies_of_each_other() -> None:
    gm, exact = compressed()
    with pytest.raises(ValueError, match="argument 2"):
        Correspondence.of_copy(gm, exact)
