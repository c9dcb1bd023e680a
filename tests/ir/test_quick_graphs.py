import copy
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import traceback

from graphopt.ir.quick_graphs import quick_graphs


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[fx.Graph]:
    """The graphs that have become code, in order."""
    graphs: list[fx.Graph] = []
    write = fx.Graph.python_code

    def noted(graph: fx.Graph, *args: Any, **kwargs: Any) -> Any:
        graphs.append(graph)
        return write(graph, *args, **kwargs)

    monkeypatch.setattr(fx.Graph, "python_code", noted)
    return graphs


def _doubled(module: fx.GraphModule) -> None:
    """Change the graph: its result counts twice."""
    output = module.graph.output_node()
    with module.graph.inserting_before(output):
        twice = module.graph.call_function(torch.mul, (output.args[0], 2))
    output.args = (twice,)
    module.recompile()


def test_a_graph_becomes_code_when_it_is_called_and_not_before(written: list[fx.Graph]) -> None:
    net, x = _Net(), torch.randn(2, 4)
    with quick_graphs():
        module = fx.symbolic_trace(net)
        _doubled(module)
        _doubled(module)
        assert written == []
        assert torch.equal(module(x), 4 * net(x))
        assert written == [module.graph]
    assert torch.equal(module(x), 4 * net(x))
    assert written == [module.graph]


@pytest.mark.parametrize(
    "use",
    [
        lambda module: module.code,
        str,
        lambda module: inspect.signature(module.forward),
        lambda module: module.recompile().src,
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: fx.symbolic_trace(module),
    ],
    ids=["code", "text", "signature", "what recompile returns", "copy", "pickle", "trace"],
)
def test_whoever_wants_the_code_afterwards_has_it(use: Callable[[fx.GraphModule], Any]) -> None:
    net, x = _Net(), torch.randn(2, 4)
    usual = fx.symbolic_trace(net)
    _doubled(usual)
    with quick_graphs():
        module = fx.symbolic_trace(net)
        _doubled(module)
    found, expected = use(module), use(usual)
    if isinstance(expected, nn.Module):
        assert torch.equal(found(x), expected(x))
        found, expected = found.code, expected.code
    assert found == expected
    assert torch.equal(module(x), usual(x))


def test_other_threads_compile_at_once(written: list[fx.Graph]) -> None:
    with quick_graphs():
        thread = threading.Thread(target=lambda: fx.symbolic_trace(_Net()))
        thread.start()
        thread.join()
        assert len(written) == 1


def _retraced(module: fx.GraphModule, passes: int) -> fx.GraphModule:
    """The graph run through by so many passes, as converters do it."""
    for number in range(passes):
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        with traceback.preserve_node_meta():
            for node in module.graph.nodes:
                with traceback.set_current_meta(node, f"pass {number}"):
                    made[node] = graph.node_copy(node, made.__getitem__)
                    made[node].meta = dict(traceback.get_current_meta())
        module = fx.GraphModule(module, graph)
    return module


def test_origins_of_nodes_are_those_that_torch_keeps() -> None:
    def origins() -> list[str]:
        module = fx.symbolic_trace(_Net())
        for node in module.graph.nodes:
            node.meta["known"] = True  # torch follows only nodes that something is known of
        last = _retraced(module, 4)
        said = [str(node.meta["from_node"]) for node in last.graph.nodes]
        graphs = {number: f"graph {place}" for place, number in enumerate(_graphs(last))}
        for number, name in graphs.items():
            said = [text.replace(str(number), name) for text in said]
        return said

    expected = origins()
    assert all(text.count("(name=") == 4 for text in expected)
    with quick_graphs():
        assert origins() == expected


def _graphs(module: fx.GraphModule) -> list[int]:
    """Numbers of the graphs that a node comes from, the youngest first."""
    [source] = next(iter(module.graph.nodes)).meta["from_node"]
    found = []
    while source is not None:
        found.append(source.node_info.graph_id)
        source = source.from_node[0] if source.from_node else None
    return found


def test_everything_is_as_before_afterwards() -> None:
    before = fx.GraphModule.recompile, traceback.copy  # type: ignore[attr-defined]
    failing = quick_graphs()
    with pytest.raises(RuntimeError, match="in between"), failing:
        raise RuntimeError("in between")
    assert (fx.GraphModule.recompile, traceback.copy) == before  # type: ignore[attr-defined]
