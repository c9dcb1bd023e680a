"""Times and plans of Core AI, with the runtime of this machine in the place of the one of macOS."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.backends import Artifact, compute_plan
from graphopt.backends.coreai.check import Running, run_asset
from graphopt.errors import VerificationError

pytestmark = [pytest.mark.coreai, pytest.mark.integration]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(16, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(pixels).relu().flatten(1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    program = graphopt.compress(_Net().eval(), (torch.randn(2, 1, 4, 4),), {"palettization": {}})
    artifact = graphopt.lower(program, "coreai")
    artifact.save(tmp_path_factory.mktemp("saved") / "net.aimodel", verify=False)
    return artifact


@pytest.fixture
def macos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is only on macOS: options of specialization, and loading an .aimodel as it is."""
    from coreai.authoring import AIModelAsset
    from coreai.runtime import AIModel
    from coreai_torch.debugging import benchmarker, utils
    from coreai_torch.debugging import compute_plan as plans

    class Options:
        def with_debug(self, *, enabled: bool) -> Options:
            assert enabled
            return self

    class Model:
        count = 0

        @classmethod
        async def load(cls, path: Path, options: Options) -> Any:
            cls.count += 1
            folder = tmp_path / f"{cls.count}.aimodelx"
            folder.mkdir()
            asset = AIModelAsset.load(path)
            await asyncio.to_thread(asset._write_odix, folder, enable_debug_info=True)
            return await AIModel.load(folder, None)

    monkeypatch.setattr(utils, "SpecializationOptions", SimpleNamespace(default=Options))
    for module in (plans, benchmarker):
        monkeypatch.setattr(module, "AIModel", Model)
    monkeypatch.setattr(compute_plan, "platform", SimpleNamespace(system=lambda: "Darwin"))


def test_asset_that_runs_again_and_again_computes_what_one_call_does(saved: Artifact) -> None:
    x = torch.randn(2, 1, 4, 4)
    assert saved.path is not None
    running = Running(saved.path, {"pixels": x})
    for _ in range(2):
        result: Any = running()
    (value,) = result.values()
    running.close()
    (expected,) = run_asset(saved.path, {"pixels": x})
    assert torch.equal(torch.from_numpy(value.numpy()), expected)


def test_inputs_that_an_asset_does_not_have_are_refused(saved: Artifact) -> None:
    assert saved.path is not None
    with pytest.raises(VerificationError, match=r"net.aimodel does not run .*\['pixels'\]"):
        Running(saved.path, {"left": torch.randn(1), "right": torch.randn(1)})


@pytest.mark.usefixtures("macos")
def test_benchmark_times_steps_and_says_where_they_run(saved: Artifact) -> None:
    outcome = saved.benchmark(runs=2)
    assert outcome.measured
    plan = outcome.plan
    assert plan is not None
    # the runtime that comes with the package has kernels for the CPU alone
    assert set(plan.devices) == {"CPU"}
    kinds = [kind for op in plan.ops for kind in op.kind.split(" + ")]
    assert any("conv" in kind for kind in kinds)
    assert "coreai.constant" not in kinds
    share = plan.share("CPU")
    assert share is not None
    assert 0.99 < share < 1.01
    assert "Core AI's compute plan and benchmarker" in str(outcome)


@pytest.mark.usefixtures("macos")
def test_state_goes_on_while_calls_are_timed(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.zeros(2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept.add_(x)
            return self.kept * 2

    artifact = graphopt.lower(graphopt.capture(Sum().eval(), (torch.ones(2, 3),)), "coreai")
    artifact.save(tmp_path / "sum.aimodel", verify=False)
    outcome = artifact.benchmark(runs=2)
    assert outcome.measured
    assert outcome.plan is not None
    assert outcome.plan.share("CPU") is None  # the benchmarker takes no state
    assert str(outcome).endswith("(Core AI's compute plan)")
