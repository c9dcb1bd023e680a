"""Palettes that train on a device: the module moved there, or its soft palettes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.devices import DEVICES
from torch import Tensor, nn

import graphopt
from graphopt.config.palettization import DKMPalettizerConfig, ModuleDKMPalettizerConfig
from graphopt.numerics.device import computing_on
from graphopt.numerics.soft_palette import soft_palette
from graphopt.palettization import (
    DKMPalettizer,
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.prepared import palette
from graphopt.schemes.tables import nearest_codes

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


def palettizer(kind: str, cluster_dim: int = 1) -> KMeansPalettizer:
    torch.manual_seed(0)
    spec = {"weight": PalettizationSpec(n_bits=2, cluster_dim=cluster_dim)}
    if kind == "dkm":
        module = ModuleDKMPalettizerConfig(op_state_spec=spec)
        return DKMPalettizer(Net().eval(), DKMPalettizerConfig(global_config=module))
    plain = ModuleKMeansPalettizerConfig(op_state_spec=spec)
    return KMeansPalettizer(Net().eval(), KMeansPalettizerConfig(global_config=plain))


def trained(
    kind: str, *, cluster_dim: int = 1, moved: str | None = None, device: str | None = None
) -> Tensor:
    """Outputs after three steps; `moved` is where the module goes, `device` where palettes are made."""
    made = palettizer(kind, cluster_dim)
    x = torch.randn(8, 8)
    prepared = made.prepare((x,), progress=False, device=device)
    if moved is not None:
        prepared.to(moved)
    optimizer = torch.optim.SGD(prepared.parameters(), 0.05)
    data = x if moved is None else x.to(moved)
    with made.training_mode():
        for _ in range(3):
            optimizer.zero_grad()
            (prepared(data) - 2 * data).square().mean().backward()
            optimizer.step()
            made.step()
    finalized = made.finalize(backend=graphopt.ExportBackend.Torch)
    place = torch.device("cpu" if moved is None else moved).type
    assert {value.device.type for value in finalized.state_dict().values()} == {place}
    return finalized.cpu()(x).detach()


@DEVICES
@pytest.mark.parametrize("kind", ["dkm", "straight through"])
def test_a_module_that_was_moved_trains_to_the_same_palettes(kind: str, device: str) -> None:
    torch.testing.assert_close(trained(kind, moved=device), trained(kind), rtol=1e-3, atol=1e-4)


@DEVICES
@pytest.mark.parametrize("cluster_dim", [1, 2])
def test_soft_palettes_of_a_device_are_those_of_the_cpu(cluster_dim: int, device: str) -> None:
    # what they start from is found there, too, by torch's operations
    found = trained("dkm", cluster_dim=cluster_dim, device=device)
    expected = trained("dkm", cluster_dim=cluster_dim)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@DEVICES
@pytest.mark.parametrize("shape", [(3, 50, 1), (1, 40_000, 1), (2, 50, 4)])
def test_values_and_gradients_are_those_of_the_cpu(
    shape: tuple[int, int, int], device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(*shape, generator=generator)
    tables = torch.randn(shape[0], 4, shape[2], generator=generator).sort(1).values
    found = []
    for place in ("cpu", device):
        given = values.clone().to(place).requires_grad_()
        mixed, final = soft_palette(
            given, tables.to(place), torch.full((shape[0],), 0.05).to(place), 2
        )
        mixed.square().sum().backward()
        assert given.grad is not None
        found.append([each.detach().cpu() for each in (mixed, final, given.grad)])
    exact = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-3, "atol": 1e-5}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, **exact)


def test_a_device_without_a_kernel_is_said_and_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, calls = palette.soft_palette, []

    def refusing(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            raise NotImplementedError("no kernel for 'aten::_softmax'")
        return real(*given)

    monkeypatch.setattr(palette, "soft_palette", refusing)
    found = trained("dkm", device="cpu")
    monkeypatch.undo()
    torch.testing.assert_close(found, trained("dkm", device="cpu"), rtol=0, atol=0)
    assert "cpu has no kernel for its soft palette (no kernel for 'aten::_softmax')" in caplog.text
    assert len(calls) == 7  # two weights in three steps, and the one that was refused


@DEVICES
def test_codes_of_tensors_elsewhere_are_those_of_the_cpu(device: str) -> None:
    values = torch.randn(2, 100, 1, generator=torch.Generator().manual_seed(0))
    tables = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.1, 0.5]])[..., None]
    with computing_on(device):
        found = nearest_codes(values.to(device), tables.to(device), None)
    assert torch.equal(found.cpu(), nearest_codes(values, tables, None))
