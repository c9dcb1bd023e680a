from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.ir.module_frames import module_frames
from graphopt.ir.program import Program


class _Net(nn.Module):
    """Layers inside of a region, of autocast also in one inside of it, and behind it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inside = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16))
        self.deeper, self.behind = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "no_grad":
            with torch.no_grad():
                y = self.deeper(self.inside(x))
        else:
            with torch.autocast("cpu", torch.bfloat16):
                y = self.inside(x)
                with torch.autocast("cpu", enabled=False):
                    y = self.deeper(y.float())
        return self.behind(torch.tanh(y))


def _of(kind: str, source: str, folder: Path) -> Program:
    net, x = _Net(kind).eval(), torch.randn(3, 8)
    if source == "module":
        return graphopt.capture(net, x)
    with torch.enable_grad():
        exported = torch.export.export(net, (x,))
    assert any(node.op == "get_attr" for node in exported.graph.nodes)  # the bodies of regions
    if source == "program":
        return graphopt.capture(exported)
    torch.export.save(exported, folder / "net.pt2")
    return graphopt.capture(folder / "net.pt2")


@pytest.mark.parametrize("source", ["module", "program", "file"])
@pytest.mark.parametrize("kind", ["autocast", "no_grad"])
def test_ops_inside_come_from_their_modules(kind: str, source: str, tmp_path: Path) -> None:
    program = _of(kind, source, tmp_path)
    owners: dict[str, list[str]] = {}
    for node in program.graph_module.graph.nodes:
        if node.op == "call_function" and (frames := module_frames(node)):
            owners.setdefault(str(node.target).split(".")[1], []).append(frames[-1].name)
    assert owners["linear"] == ["inside.0", "deeper", "behind"]
    assert owners["relu"] == ["inside.1"]
    assert owners["layer_norm"] == ["inside.2"]
    assert owners["tanh"] == [""]


@pytest.mark.parametrize("kind", ["autocast", "no_grad"])
def test_configs_find_layers_inside_by_their_type(kind: str, tmp_path: Path) -> None:
    wide, narrow = ({"op_state_spec": {"weight": {"n_bits": bits}}} for bits in (8, 2))
    config = {
        "palettization": {
            "global_config": wide,
            "module_type_configs": {"torch.nn.modules.linear.Linear": narrow},
        }
    }
    report = graphopt.compress(_of(kind, "file", tmp_path), config=config).report()
    assert [row.n_bits for row in report.palettized] == [2, 2, 2]


@pytest.mark.parametrize("kind", ["autocast", "no_grad"])
def test_programs_compute_what_their_models_do(kind: str) -> None:
    net, x = _Net(kind).eval(), torch.randn(3, 8)
    program = graphopt.capture(net, x)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), net(x), rtol=0, atol=0)


def test_torchs_own_regions_are_there_again_afterwards() -> None:
    kinds = [type(torch.ops.higher_order.wrap_with_autocast)]
    kinds += [type(torch.ops.higher_order.wrap_with_set_grad_enabled)]
    before = [kind.__call__ for kind in kinds]
    graphopt.capture(_Net("autocast").eval(), torch.randn(3, 8))
    assert [kind.__call__ for kind in kinds] == before
