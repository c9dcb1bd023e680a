"""An MLP, its data, and a palettizer prepared for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)

CALIBRATED = ("skm", "gptq")


def config(algorithm: str = "auto", n_bits: int = 2, **names: str) -> KMeansPalettizerConfig:
    """One spec everywhere; `names` are modules with another algorithm."""

    def module(kind: str) -> ModuleKMeansPalettizerConfig:
        spec = PalettizationSpec(n_bits=n_bits, algorithm=kind)
        return ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})

    return KMeansPalettizerConfig(
        global_config=module(algorithm),
        module_name_configs={name: module(kind) for name, kind in names.items()},
    )


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


WEIGHTS = ("first.weight", "second.weight", "head.weight")


def mlp() -> MLP:
    torch.manual_seed(0)
    return MLP().eval()


def inputs(count: int, seed: int = 1) -> Tensor:
    """Features of very different importance."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([3.0, 1.0, 1.0, 0.3, 0.1, 0.03])


DATA = [inputs(12), inputs(20, seed=2)]


@cache
def captured() -> graphopt.Program:
    """The MLP, captured once for all tests."""
    return graphopt.capture(mlp(), (DATA[0][:2],))


def prepared_for(
    model: nn.Module | graphopt.Program,
    setup: KMeansPalettizerConfig | None = None,
    args: Any = None,
    **options: Any,
) -> tuple[KMeansPalettizer, Any]:
    palettizer = KMeansPalettizer(model, setup or config())
    if args is None and isinstance(model, nn.Module):
        args = (DATA[0][:2],)
    return palettizer, palettizer.prepare(args, progress=False, **options)


def state(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, groups=3)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.conv(x).relu()).relu()
        return self.fc(self.up(y).tanh().mean((2, 3)))


def losses(kind: str) -> Callable[[Any, Any], Tensor]:
    return lambda y, target: F.cross_entropy(y, target, reduction=kind)


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, 2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, 2, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def trained(kind: str) -> tuple[nn.Module, Tensor]:
    """A net trained on digits, and the inputs."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    torch.manual_seed(0)
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(digits.target)
    if kind == "mlp":
        x = x.flatten(1)
        model: nn.Module = nn.Sequential(
            nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
        )
    else:
        model = Digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        chosen = torch.randint(0, 1200, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model.eval(), x
