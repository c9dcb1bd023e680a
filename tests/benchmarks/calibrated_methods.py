"""The methods that `calibrated.py` compares, each as a function that returns a trained or calibrated net."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPOCHS = 3  # of training-time methods


BATCH = 64


CALIBRATION = 512


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 64, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.first = Residual(64)
        self.down = nn.Conv2d(64, 128, 3, 2, 1)
        self.second = Residual(128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(F.relu(self.norm(self.stem(x))))
        x = self.second(F.relu(self.down(x)))
        return self.head(x.mean((2, 3)))


class Memory:
    """Peak of resident memory above that at the start, in MiB."""

    def __enter__(self) -> Memory:
        self._stop = threading.Event()
        self._base = self.peak = self._now()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.mib = (self.peak - self._base) / 2**20

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()


Result = tuple[nn.Module, float, float]


def timed(work: Callable[[], nn.Module]) -> Result:
    started = time.perf_counter()
    with Memory() as memory:
        module = work()
    return module, time.perf_counter() - started, memory.mib


def calibration(train: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    x, y = train[0][:CALIBRATION], train[1][:CALIBRATION]
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def with_labels(palettizer: Any, prepared: nn.Module, train: tuple[Tensor, Tensor]) -> nn.Module:
    with palettizer.calibration_mode(loss_fn=F.cross_entropy) as skm:
        for x, y in calibration(train):
            skm.step(prepared(x), y)
    return prepared


def our_skm(model: nn.Module, train: tuple[Tensor, Tensor], bits: int, algorithm: str) -> Any:
    from graphopt.palettization import (
        KMeansPalettizer,
        KMeansPalettizerConfig,
        ModuleKMeansPalettizerConfig,
        PalettizationSpec,
    )

    spec = PalettizationSpec(n_bits=bits, algorithm=algorithm)
    config = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    palettizer = KMeansPalettizer(model, KMeansPalettizerConfig(global_config=config))
    prepared = palettizer.prepare((train[0][:1],))

    def work() -> nn.Module:
        if algorithm == "gptq":
            palettizer.calibrate([x for x, _ in calibration(train)])
            return prepared
        return with_labels(palettizer, prepared, train)

    return work


def coreai_skm(model: nn.Module, train: tuple[Tensor, Tensor], bits: int) -> Any:
    from coreai_opt.palettization import (
        KMeansPalettizer,
        KMeansPalettizerConfig,
        ModuleKMeansPalettizerConfig,
        PalettizationSpec,
    )

    spec = PalettizationSpec(n_bits=bits)
    config = ModuleKMeansPalettizerConfig(
        op_state_spec={"weight": spec}, enable_fast_kmeans_mode=False
    )
    palettizer = KMeansPalettizer(model, KMeansPalettizerConfig(global_config=config))
    prepared = palettizer.prepare((train[0][:1],))

    return lambda: with_labels(palettizer, prepared, train)


def coreml_skm(model: nn.Module, train: tuple[Tensor, Tensor], bits: int) -> Any:
    from coremltools.optimize.torch.palettization import SKMPalettizer, SKMPalettizerConfig

    config = SKMPalettizerConfig.from_dict(
        {"global_config": {"n_bits": bits}, "calibration_nsamples": CALIBRATION}
    )

    def loss(network: nn.Module, data: Any) -> Tensor:
        return F.cross_entropy(network(data[0]), data[1])

    # the peer counts batches as samples: single ones give it the per-sample gradients it asks for
    singles = [
        (x[None], y[None])
        for x, y in zip(train[0][:CALIBRATION], train[1][:CALIBRATION], strict=True)
    ]
    return lambda: SKMPalettizer(model, config).compress(dataloader=singles, loss_fn=loss)


def training(
    prepared: nn.Module,
    train: tuple[Tensor, Tensor],
    step: Callable[[], Any],
    seed: int,
    epochs: int,
) -> None:
    optimizer = torch.optim.Adam(prepared.parameters(), lr=1e-3)
    torch.manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(train[1])).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(prepared(train[0][batch]), train[1][batch]).backward()
            optimizer.step()
            step()


def our_dkm(model: nn.Module, train: tuple[Tensor, Tensor], bits: int, epochs: int = EPOCHS) -> Any:
    from graphopt.palettization import (
        DKMPalettizer,
        DKMPalettizerConfig,
        ModuleDKMPalettizerConfig,
        PalettizationSpec,
    )

    config = ModuleDKMPalettizerConfig(op_state_spec={"weight": PalettizationSpec(n_bits=bits)})
    palettizer = DKMPalettizer(model, DKMPalettizerConfig(global_config=config))
    prepared = palettizer.prepare((train[0][:1],))

    def work() -> nn.Module:
        with palettizer.training_mode():
            training(prepared, train, palettizer.step, 0, epochs)
        return prepared

    return work


def coreml_dkm(
    model: nn.Module, train: tuple[Tensor, Tensor], bits: int, epochs: int = EPOCHS
) -> Any:
    from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig

    config = DKMPalettizerConfig.from_dict(
        {"global_config": {"n_bits": bits, "weight_threshold": 0, "milestone": 0}}
    )
    palettizer = DKMPalettizer(model, config)

    def work() -> nn.Module:
        prepared = palettizer.prepare()
        prepared.train()
        training(prepared, train, palettizer.step, 0, epochs)
        prepared.eval()
        return palettizer.finalize()

    return work


def linear_step(kind: str) -> dict[str, float]:
    """Seconds and MiB of training steps of one 1024×4096 linear layer at 3 bits."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(4096, 1024))
    x = torch.randn(32, 4096)
    palettizer: Any = None
    if kind == "ours":
        from graphopt.palettization import (
            DKMPalettizer,
            DKMPalettizerConfig,
            ModuleDKMPalettizerConfig,
            PalettizationSpec,
        )

        section = ModuleDKMPalettizerConfig(op_state_spec={"weight": PalettizationSpec(n_bits=3)})
        palettizer = DKMPalettizer(model, DKMPalettizerConfig(global_config=section))
        model = palettizer.prepare((x,))
        model.train()
    elif kind == "coremltools":
        from coremltools.optimize.torch.palettization import DKMPalettizer as Peer
        from coremltools.optimize.torch.palettization import DKMPalettizerConfig as PeerConfig

        palettizer = Peer(model, PeerConfig.from_dict({"global_config": {"n_bits": 3}}))
        model = palettizer.prepare()
        model.train()
        palettizer.step()
        model(x)  # its first call runs the clustering that ours ran in prepare
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    with Memory() as memory:
        step()
    started = time.perf_counter()
    step()
    step()
    return {"seconds": (time.perf_counter() - started) / 2, "mib": memory.mib}


def vectors(kind: str) -> dict[str, float]:
    """Seconds and squared error of 256 entries of length 4 for a 512×512 weight."""
    torch.manual_seed(0)
    weight = torch.randn(512, 512) * 0.02
    layer = nn.Linear(512, 512, bias=False)
    layer.weight.data.copy_(weight)
    if kind == "ours":
        from graphopt.palettization import PalettizationSpec
        from graphopt.schemes.palettize import palettize

        spec = PalettizationSpec(n_bits=8, cluster_dim=4)
        palettize(torch.randn(64, 64), spec)
        started = time.perf_counter()
        dense = palettize(weight, spec).dense()
    else:
        from coreai_opt.palettization import (
            KMeansPalettizer,
            KMeansPalettizerConfig,
            ModuleKMeansPalettizerConfig,
            PalettizationSpec,
        )

        config = ModuleKMeansPalettizerConfig(
            op_state_spec={"weight": PalettizationSpec(n_bits=8, cluster_dim=4)},
            enable_fast_kmeans_mode=False,
        )
        palettizer = KMeansPalettizer(
            nn.Sequential(layer), KMeansPalettizerConfig(global_config=config)
        )
        started = time.perf_counter()
        prepared = palettizer.prepare((torch.randn(1, 512),))
        dense = next(prepared.children()).weight.detach()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "sse": float((dense - weight).double().square().sum())}


JOBS: dict[str, Callable[..., Any]] = {
    "SKM, graphopt": lambda m, t, b: our_skm(m, t, b, "skm"),
    "SKM, coreai-opt": coreai_skm,
    "SKM, coremltools": coreml_skm,
    "output feedback, graphopt": lambda m, t, b: our_skm(m, t, b, "gptq"),
    "DKM, graphopt": our_dkm,
    "DKM, coremltools": coreml_dkm,
}
