"""Threads: what several do at once is what one does, and what is the process's stays the caller's."""

from __future__ import annotations

import copy
import os
import random
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import rdo
from graphopt.mixed_precision import analyze
from graphopt.palettization import KMeansPalettizerConfig
from graphopt.quantization import QuantizerConfig

X = torch.linspace(-1, 1, 128).reshape(4, 2, 4, 4)


with torch.random.fork_rng():
    torch.manual_seed(0)
    NET = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8)
    ).eval()


def net() -> nn.Module:
    # all threads share the generator that would draw new weights
    return copy.deepcopy(NET)


def outputs(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module(X)


def captured() -> Any:
    program = graphopt.capture(net(), (X[:2],))
    return program.provenance.static_dims, outputs(program.module())


def compressed(config: Any) -> Any:
    program = graphopt.compress(net(), (X,), config, calibration_data=[X])
    return outputs(program.module())


def saved(target: str, suffix: str, folder: Path) -> Any:
    path = folder / f"{threading.get_ident()}-{random.SystemRandom().random()}{suffix}"
    artifact = graphopt.lower(net(), target, (X,))
    artifact.save(path)
    assert artifact.verification is not None
    return artifact.verification.max_error, artifact.size


def read_back(folder: Path) -> Any:
    path = folder / f"{threading.get_ident()}-{random.SystemRandom().random()}.pt2"
    graphopt.lower(net(), "torch", (X,)).save(path, verify=False)
    return outputs(graphopt.capture(path).module())


def table() -> Any:
    return analyze(net(), (X,), [2, 4], [X], "mse").values()


def optimized() -> Any:
    config = {"target_bits": 6, "rounding": {"blocks": "none"}, "draws": 1}
    program, _ = rdo.optimize(net(), (X,), [X], config, progress=False)
    return outputs(program.module())


def entry_points(folder: Path) -> dict[str, Callable[[], Any]]:
    return {
        "capture": captured,
        "palettes": lambda: compressed(KMeansPalettizerConfig()),
        "w8a8": lambda: compressed(QuantizerConfig()),
        "file": lambda: read_back(folder),
        "save": lambda: saved("torch", ".pt2", folder),
        "analyze": table,
        "rdo": optimized,
    }


def targets(folder: Path) -> dict[str, Callable[[], Any]]:
    return {
        "coreai": lambda: saved("coreai", ".aimodel", folder),
        "coreml": lambda: saved("coreml", ".mlpackage", folder),
        "executorch": lambda: saved("executorch", ".pte", folder),
        "onnx": lambda: saved("onnx", ".onnx", folder),
    }


def in_threads(calls: dict[str, Callable[[], Any]], threads: int) -> list[dict[str, Any]]:
    """What each of some threads gets, which begin at different ones of the calls."""
    results: list[dict[str, Any]] = [{} for _ in range(threads)]
    ready = threading.Barrier(threads)

    def work(number: int) -> None:
        names = list(calls)
        names = names[2 * number % len(names) :] + names[: 2 * number % len(names)]
        ready.wait()
        for name in names:
            try:
                results[number][name] = calls[name]()
            except Exception as error:
                results[number][name] = f"{type(error).__name__}: {error}"

    started = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return results


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and bool(one == other)


def compare(calls: dict[str, Callable[[], Any]], threads: int) -> None:
    alone = {name: call() for name, call in calls.items()}
    for result in in_threads(calls, threads):
        for name, wanted in alone.items():
            assert equal(result[name], wanted), (name, result[name])
    assert not torch.compiler.is_exporting()
    assert not torch.compiler.is_compiling()


def test_two_threads_capture_what_one_captures(tmp_path: Path) -> None:
    calls = entry_points(tmp_path)
    compare({name: calls[name] for name in ("capture", "save")}, 2)


@pytest.mark.slow
def test_four_threads_on_all_entry_points_get_what_one_gets(tmp_path: Path) -> None:
    compare(entry_points(tmp_path), 4)


@pytest.mark.slow
def test_four_threads_on_all_targets_get_what_one_gets(tmp_path: Path) -> None:
    for package in ("coreai_torch", "coremltools", "executorch", "onnxruntime"):
        pytest.importorskip(package)
    compare(targets(tmp_path), 4)


def state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "filters": list(warnings.filters),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "exporting": torch.compiler.is_exporting(),
    }


@pytest.mark.parametrize("name", ["palettes", "w8a8", "save", "analyze"])
def test_the_process_is_as_it_was_after_a_call(tmp_path: Path, name: str) -> None:
    before = state()
    entry_points(tmp_path)[name]()
    assert state() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rdo", "coreai", "coreml", "executorch", "onnx"])
def test_the_process_is_as_it_was_after_a_long_call(tmp_path: Path, name: str) -> None:
    before = state()
    {**entry_points(tmp_path), **targets(tmp_path)}[name]()
    assert state() == before


def test_a_model_that_draws_leaves_the_callers_random_state() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    before = state()
    graphopt.capture(Noisy(), (X,))
    assert state() == before
