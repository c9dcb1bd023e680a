"""Ranges of activations, norms and biases are tuned together, by the rules that scales obey."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import CalibrationError, InputError
from graphopt.ir.annotations import rounding_of
from graphopt.ir.captured_module import CapturedModule
from graphopt.quantization import Quantizer, QuantizerConfig

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A norm, a sum, a view and, unless it is told otherwise, a concatenation."""

    def __init__(self, *, joined: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.joined = joined
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 4)
        self.norm, self.d = nn.LayerNorm(8), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.norm(x)).relu()
        z = y + self.b(y).softmax(-1)
        if not self.joined:
            return self.c.weight.sum() + self.b(z).tanh()
        return self.d(self.c(torch.cat([y, z], -1).reshape(-1, 2, 16)).tanh())


def noise(seed: int, rows: int = 32) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


# the first call alone has outliers, so that ranges are far wider than they should be
DATA = [noise(0) * 3, *map(noise, range(1, 8))]
SEEN, FRESH = torch.cat(DATA), noise(99, 256)


def config(**spec: Any) -> QuantizerConfig:
    wanted = {"dtype": "int4", "qscheme": "asymmetric", **spec}
    whole = {"op_input_spec": {"*": wanted}, "op_output_spec": {"*": wanted}}
    state = {"weight": {"algorithm": "nearest"}}
    return QuantizerConfig.from_dict({"global_config": {**whole, "op_state_spec": state}})


def compressed(how: QuantizerConfig, *, joined: bool = True) -> tuple[Any, Any, nn.Module]:
    """A quantized program, the program that it was, and the model."""
    model = Net(joined=joined).eval()
    program = graphopt.capture(model, (DATA[0],))
    return graphopt.compress(program, None, how, DATA), program, model


def tuned(made: Any, program: Any, steps: int = 40) -> Any:
    return graphopt.tune(made, program, DATA, steps=steps, learning_rate=0.3, progress=False)


def error(module: nn.Module, model: nn.Module) -> float:
    with torch.no_grad():
        return float((module(SEEN) - model(SEEN)).square().mean())


def rounded(gm: CapturedModule) -> dict[str, set[tuple[Any, ...]]]:
    """Sharing group → scale and zero point of its ops, tensors as lists."""
    found = defaultdict(set)
    for node in gm.graph.nodes:
        point = rounding_of(node)
        if point is not None:
            held = (
                tuple(gm.get_buffer(str(each.target)).tolist()) if hasattr(each, "op") else each
                for each in node.args[1:3]
            )
            found[point.group].add(tuple(held))
    return dict(found)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"qscheme": "symmetric"},
        {"granularity": {"type": "per_channel", "axis": -1}},
        {"qformulation": "minval"},
    ],
    ids=["affine", "symmetric", "per channel", "minimum"],
)
def test_error_falls_and_ops_of_one_scale_keep_one(spec: dict[str, Any]) -> None:
    joined = "granularity" not in spec  # channels of two extents share no scales
    made, program, model = compressed(config(**spec), joined=joined)
    groups, graph = rounded(made.graph_module), made.graph_module.graph
    better = tuned(made, program)
    after = rounded(better.graph_module)
    assert error(better.module(), model) < 0.95 * error(made.module(), model)
    assert after.keys() == groups.keys()
    assert len(better.graph_module.graph.nodes) == len(graph.nodes)
    assert all(len(each) == 1 for each in after.values())
    assert any(after[name] != groups[name] for name in groups)
    for name, ((scale, zero),) in after.items():
        ((_, old),) = groups[name]
        scales, zeros = (each if isinstance(each, tuple) else (each,) for each in (scale, zero))
        assert min(scales) > 0
        assert all(isinstance(each, int) for each in zeros)
        if spec.get("qscheme") == "symmetric" or "qformulation" in spec:
            assert zero == old


def test_fixed_ranges_stay() -> None:
    made, program, _ = compressed(config(float_range=[-4.0, 4.0]))
    better = tuned(made, program, steps=10)
    assert rounded(better.graph_module) == rounded(made.graph_module)


def test_scales_found_at_run_time_stay_so() -> None:
    made, program, model = compressed(config(qparam_calculator_cls="dynamic"))
    better = tuned(made, program, steps=10)
    assert str(better.graph_module.graph) == str(made.graph_module.graph)
    assert error(better.module(), model) <= error(made.module(), model)


def test_record_has_the_scales_of_the_graph() -> None:
    made = graphopt.compress(Net().eval(), (DATA[0],), config(), DATA, tune_steps=30)
    rows = {r.name: r for r in made.report().activations if r.status == "quantized"}
    groups = rounded(made.graph_module)
    assert groups
    for name, ((scale, zero),) in groups.items():
        assert rows[name].scale == pytest.approx(scale)
        assert rows[name].offset == pytest.approx(zero)


def test_seed_decides_and_ways_in_agree() -> None:
    model = Net().eval()
    first, second, other = (
        graphopt.compress(model, (DATA[0],), config(), DATA, tune_steps=60, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.module()(FRESH), second.module()(FRESH))
    assert not torch.equal(first.module()(FRESH), other.module()(FRESH))
    quantizer = Quantizer(model, config())
    quantizer.prepare((DATA[0],))
    quantizer.calibrate(DATA, progress=False)
    plain = quantizer.finalize(backend="torch")
    better = quantizer.finalize(backend="torch", tune_steps=60)
    assert error(better, model) < error(plain, model)
    torch.testing.assert_close(better(FRESH), first.module()(FRESH))


def test_tuning_without_data_or_behind_training_is_refused() -> None:
    with pytest.raises(CalibrationError, match="tune_steps=3 needs calibration data"):
        graphopt.compress(Net().eval(), (DATA[0],), config(), tune_steps=3)
    quantizer = Quantizer(Net().eval(), config())
    prepared = quantizer.prepare((DATA[0],))
    with pytest.raises(CalibrationError, match="tune_steps=3 needs calibration data"):
        quantizer.finalize(backend="torch", tune_steps=3)
    with quantizer.training_mode():
        prepared(DATA[1])
        quantizer.step()
    with pytest.raises(InputError, match="before its training"):
        quantizer.finalize(backend="torch", tune_steps=3)


def test_migrated_scales_are_tuned_and_blocks_end_where_values_are_the_models() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.b, self.c = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)
            spread = 10.0 ** torch.linspace(-1, 1, 8)
            with torch.no_grad():
                self.norm.weight.copy_(spread)
                self.b.weight.mul_(spread.flip(0)[:, None] / spread)
                self.c.weight.div_(spread.flip(0))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.nn.functional.gelu(self.b(self.norm(x))))

    model = Scaled().eval()
    program = graphopt.capture(model, (DATA[0],))
    made = graphopt.compress(program, None, config(), DATA)
    better = graphopt.tune(made, program, DATA, blocks="auto", steps=40, progress=False)
    assert error(better.module(), model) < error(made.module(), model)
    factors = [each.graph_module.get_buffer("gelu_scale") for each in (made, better)]
    assert not torch.equal(*factors)


@pytest.mark.integration
def test_tuned_program_runs_on_executorch(tmp_path: Path) -> None:
    model, how = Net().eval(), config(dtype="int8", range_calculator_cls="minmax")
    data = list(map(noise, range(1, 65)))
    plain, made = (
        graphopt.compress(model, (DATA[0],), how, data, backend="executorch", tune_steps=steps)
        for steps in (0, 120)
    )
    assert rounded(made.graph_module) != rounded(plain.graph_module)
    assert error(made.module(), model) < error(plain.module(), model)
    made.save(tmp_path / "net.pte")  # compares with PyTorch before the file gets its name
    assert (tmp_path / "net.pte").stat().st_size > 0
