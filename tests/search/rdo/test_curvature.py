from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from search.mixed_precision.nets import encoder, sentences
from search.rdo.nets import calibration, trained
from torch import Tensor

import graphopt
from graphopt.errors import InputError
from graphopt.ir.program import Program
from graphopt.run.batches import as_batch
from graphopt.search.mixed_precision.layers import uses_of
from graphopt.search.rdo.curvature import Curvature, GradientOptions

pytestmark = pytest.mark.usefixtures("one_thread")


def program() -> Program:
    return graphopt.capture(trained(), (calibration()[0][:2],))


def measured(found: Program, names: list[str], metric: str, draws: int = 8) -> Curvature:
    gm = found.graph_module
    nodes = [node for node in gm.graph.nodes if node.name in names]
    uses = list(uses_of(gm, ["conv1.weight"]).values())
    batches = [as_batch(x) for x in calibration()]
    return Curvature(
        gm, batches, [nodes], uses, GradientOptions(metric=metric, draws=draws, progress=False)
    )


def with_change(found: Program, name: str, changes: list[Tensor]) -> list[Tensor]:
    """Outputs of the network when a node's value is changed."""
    outputs = []
    for x, change in zip(calibration(), changes, strict=True):

        class Runner(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node, change: Tensor = change) -> object:
                result = super().run_node(n)
                return result + change if n.name == name else result

        with torch.no_grad():
            done = Runner(found.graph_module).run(x, enable_io_processing=False)
        outputs.append(done[0] if isinstance(done, tuple | list) else done)
    return outputs


@pytest.mark.parametrize("metric", ["kl", "mse"])
@pytest.mark.parametrize("name", ["relu", "relu_2"])
def test_loss_is_that_of_the_changed_network(name: str, metric: str) -> None:
    found = program()
    curvature = measured(found, [name], metric, draws=16)
    generator = torch.Generator().manual_seed(0)
    shapes = [each.shape for each in curvature.gradients(name)[0]]
    changes = [0.01 * torch.randn(shape, generator=generator) for shape in shapes]
    moved, exact = (
        torch.cat(with_change(found, name, each))
        for each in (changes, [torch.zeros(shape) for shape in shapes])
    )
    if metric == "kl":
        logs = exact.log_softmax(1)
        expected = float((logs.exp() * (logs - moved.log_softmax(1))).sum(1).mean())
    else:
        expected = float(F.mse_loss(moved, exact))
    assert curvature.loss({name: changes}, range(len(changes))) == pytest.approx(expected, rel=0.15)


def test_errors_that_the_head_does_not_see_cost_nothing() -> None:
    """The last relu is averaged over positions: what cancels there is no error."""
    found = program()
    curvature = measured(found, ["relu_2"], "kl", draws=2)
    checkers = torch.ones(4, 4)
    checkers[::2, ::2] = checkers[1::2, 1::2] = -1
    changes = [0.1 * checkers.expand(each.shape) for each in curvature.gradients("relu_2")[0]]
    flat = [0.1 * torch.ones(each.shape) for each in curvature.gradients("relu_2")[0]]
    numbers = range(len(changes))
    assert curvature.loss({"relu_2": changes}, numbers) < 1e-4 * curvature.loss(
        {"relu_2": flat}, numbers
    )


def test_weightings_have_mean_one_and_follow_the_gradients() -> None:
    curvature = measured(program(), ["relu_1"], "kl", draws=2)
    fisher = curvature.weighting("relu_1", 0, "fisher")
    mean = curvature.weighting("relu_1", 0, "mean")
    assert curvature.weighting("relu_1", 0, "none") is None
    assert fisher is not None
    assert mean is not None
    squares = torch.stack([d[0].float().square() for d in curvature.gradients("relu_1")]).mean(0)
    torch.testing.assert_close(fisher, squares / squares.mean())
    torch.testing.assert_close(mean[3], squares.mean(0) / squares.mean())
    assert float(mean.mean()) == pytest.approx(1.0, rel=1e-4)


def test_rows_are_squared_gradients_of_the_outputs() -> None:
    found = program()
    curvature = measured(found, ["conv2d_1"], "kl", draws=1)
    gradients = [each.float() for each in curvature.gradients("conv2d_1")[0]]
    expected = torch.stack([g.square().sum((2, 3)).mean(0) for g in gradients]).sum(0)
    torch.testing.assert_close(curvature.rows["conv2d_1"], expected, rtol=2e-2, atol=1e-8)
    saliency = curvature.saliency["conv2d_1"][0]
    level = gradients[0].square().mean(1).flatten(1)
    torch.testing.assert_close(saliency, level / level.mean(1, keepdim=True), rtol=5e-2, atol=1e-3)


def test_gradients_are_drawn_by_the_seed() -> None:
    a, b = (measured(program(), ["relu"], "kl", draws=1) for _ in range(2))
    assert torch.equal(a.gradients("relu")[0][0], b.gradients("relu")[0][0])


def test_several_outputs_and_integers_among_the_inputs() -> None:
    found = graphopt.capture(encoder(), (sentences()[0][:2],))
    gm = found.graph_module
    node = next(n for n in gm.graph.nodes if "layer_norm" in n.name)
    batches = [as_batch(x) for x in sentences()]
    curvature = Curvature(gm, batches, [[node]], [], GradientOptions(metric="mse", progress=False))
    assert curvature.gradients(node.name)[0][0].shape == (6, 7, 16)
    assert bool(curvature.gradients(node.name)[0][0].any())


def test_a_model_whose_outputs_do_not_depend_on_the_nodes_is_refused() -> None:
    class Constant(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.argmax(x, 1)

    gm = graphopt.capture(Constant(), (torch.randn(2, 3),)).graph_module
    with pytest.raises(InputError, match="no floating-point output"):
        Curvature(
            gm, [as_batch(torch.randn(2, 3))], [], [], GradientOptions(metric="mse", progress=False)
        )


def test_gradients_that_do_not_fit_are_computed_for_some_blocks_at_a_time() -> None:
    found = program()
    nodes = [[n] for n in found.graph_module.graph.nodes if n.name in ("relu", "relu_1", "relu_2")]
    batches = [as_batch(x) for x in calibration()]
    whole, parts = (
        Curvature(
            found.graph_module,
            batches,
            nodes,
            [],
            GradientOptions(metric="kl", draws=2, memory=memory, progress=False),
        )
        for memory in (1 << 30, 0)
    )
    for (node,) in (*nodes, nodes[0]):
        for one, other in zip(whole.gradients(node.name), parts.gradients(node.name), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert len(parts._held) == 1
    assert len(whole._held) == 3
