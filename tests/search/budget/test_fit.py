"""A size in, the best artifact of that size out."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.shell import command
from torch import Tensor, nn

import graphopt
from graphopt.backends import load_backend
from graphopt.errors import (
    ArtifactExistsError,
    ConfigError,
    InfeasibleError,
    InputError,
    LoweringError,
)
from graphopt.search.budget.offers import offered
from graphopt.search.budget.result import FitResult

NAMES = ["0.weight", "2.weight", "4.weight"]
TOOLCHAINS = ("coreai", "coreml", "executorch", "onnx")


@cache
def net() -> nn.Module:
    """A net whose first layer has few distinct values, so that it takes few bits without loss."""
    torch.manual_seed(0)
    layers = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[0].weight.copy_((model[0].weight * 32).round() / 32)
    return model


def calls(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 64, generator=generator) for _ in range(count)]


def fitted(folder: Path, size: float | str, suffix: str = ".pt2", **options: Any) -> FitResult:
    path = folder / f"model{suffix}"
    return graphopt.fit(net(), calls(1)[0], calls(), size=size, path=path, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    return fitted(tmp_path_factory.mktemp("small"), "40KB", candidates=[2, 4, 8])


def test_file_has_at_most_the_size_that_was_asked_for(small: FitResult) -> None:
    path = small.artifact.path
    assert path is not None
    assert path.stat().st_size == small.size <= small.asked == 40_000
    assert small.artifact.verification is not None
    assert small.artifact.verification.holds


def test_measured_error_is_that_of_the_calls_that_were_held_out(small: FitResult) -> None:
    assert (small.measured.calls, small.measured.data) == (1, "held out")
    (held,) = [call for number, call in enumerate(calls()) if number == 3]
    with torch.no_grad():
        want, got = net()(held).double(), small.program.module()(held).double()
    noise = float((want - got).square().mean())
    psnr = 10 * math.log10(float(want.square().max()) / noise)
    assert small.measured.psnr == pytest.approx(psnr, rel=1e-6)
    cosine = float((want * got).sum(-1).div(want.norm(dim=-1) * got.norm(dim=-1)).mean())
    assert small.measured.cosine == pytest.approx(cosine, rel=1e-6)


def test_layers_that_lose_nothing_get_the_fewest_bits(small: FitResult) -> None:
    bits = {
        layer.name: layer.bits_of(small.recipe.choice[layer.name]) / layer.numel
        for layer in small.recipe.layers
    }
    assert list(bits) == NAMES
    assert bits["0.weight"] < bits["2.weight"] <= bits["4.weight"]


def test_next_choices_are_clearly_better_or_smaller(small: FitResult) -> None:
    better, smaller = small.better, small.smaller
    assert better is not None
    assert smaller is not None
    assert better.size > small.size > smaller.size
    assert better.predicted >= small.predicted + 1 >= smaller.predicted + 2
    assert "next better" in str(small)
    assert "\n" not in repr(small)


@pytest.mark.slow
def test_next_choice_has_about_the_size_that_was_said(small: FitResult, tmp_path: Path) -> None:
    assert small.better is not None
    made = fitted(tmp_path, small.better.size * 1.01, candidates=[2, 4, 8])
    assert made.predicted >= small.better.predicted - 1e-9
    assert made.size == pytest.approx(small.better.size, rel=0.03)


def test_size_that_no_choice_has_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        InfeasibleError, match=r"file of 3,000 bytes: the smallest.* takes \d\d,\d{3}"
    ):
        fitted(tmp_path, "3KB", candidates=[2, 4])
    assert list(tmp_path.iterdir()) == []


def test_room_for_everything_leaves_no_error(tmp_path: Path) -> None:
    result = fitted(tmp_path, "1MB", candidates=[4])
    assert result.measured.psnr == math.inf
    assert result.better is None
    assert result.smaller is not None
    assert "exact" in str(result)


def test_without_data_the_example_counts_and_it_is_said(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    result = graphopt.fit(net(), calls(1)[0], size=60_000, path=path, candidates=[4, 8])
    assert result.measured.data == "example"
    assert result.size <= 60_000


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"size": "much"}, ConfigError, "no size"),
        ({"path": "m.bin"}, LoweringError, r"\.bin"),
        ({"held_out": 1.5}, InputError, "held_out"),
        ({"backend": "coreml"}, LoweringError, "must end in"),
        ({"seeds": 1}, graphopt.errors.OptionError, "seed"),
    ],
)
def test_mistakes_are_named_before_any_work(
    change: dict[str, Any], kind: type[Exception], words: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"size": "1MB", "path": "m.pt2", **change}
    given["path"] = tmp_path / given["path"]
    with pytest.raises(kind, match=words):
        graphopt.fit(net(), calls(1)[0], calls(), **given)


def test_existing_file_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_text("mine")
    with pytest.raises(ArtifactExistsError):
        fitted(tmp_path, "40KB")
    assert (tmp_path / "model.pt2").read_text() == "mine"


@pytest.mark.parametrize(
    "target",
    [
        *(pytest.param(name, marks=getattr(pytest.mark, name)) for name in TOOLCHAINS),
        "torch",
    ],
)
def test_every_target_is_offered_what_it_holds(target: str) -> None:
    backend = load_backend(target)
    names = {candidate.name for candidate in offered(backend)}
    assert "int8" in names
    held = {f"{bits}-bit" for bits in (1, 2, 4, 6, 8)}
    if backend.capabilities.index_bits:
        assert held <= names


def test_shell_makes_the_same_file_and_prints_errors_and_the_next_choices(
    small: FitResult, tmp_path: Path
) -> None:
    torch.export.save(torch.export.export(net(), (calls(1)[0],)), tmp_path / "m.pt2")
    torch.save(torch.cat(calls()), tmp_path / "x.pt")
    words = ("fit", "m.pt2", "--data", "x.pt", "--batch-size", "16", "--candidates", "2,4,8")
    done = command(tmp_path, *words, "--size", "40KB", "-o", "o.pt2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for text in (
        "of 40,000 bytes",
        "next smaller",
        "next better",
        str(small.measured),
        "outputs differ",
    ):
        assert text in " ".join(done.stdout.split()), text
    program = graphopt.capture(tmp_path / "o.pt2")
    for (name, one), (_, other) in zip(
        program.module().state_dict().items(),
        small.program.module().state_dict().items(),
        strict=True,
    ):
        assert torch.equal(one, other), name
    again = command(tmp_path, *words, "--size", "40KB", "-o", "o.pt2")
    assert again.returncode == 7
    refused = command(tmp_path, *words, "--size", "3KB", "-o", "p.pt2", "--json")
    assert refused.returncode == 10
    assert refused.stdout == ""
