"""Budgets asked for and files that came of them: `python tests/helpers/budget_table.py [target …]`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphopt
from graphopt.errors import InfeasibleError
from graphopt.files import stored_size
from graphopt.mixed_precision import Recipe, SensitivityTable, analyze

__all__ = ["BUDGETS", "SUFFIXES", "X", "net", "saved", "table"]

SUFFIXES = {"torch": ".pt2", "coreai": ".aimodel", "coreml": ".mlpackage", "executorch": ".pte"}
# int8 or floats are what is chosen from there
BUDGETS: dict[str, tuple[str, ...]] = dict.fromkeys(SUFFIXES, ("48 KiB", "60 KB", "0.1 MB"))
BUDGETS["executorch"] = ("80 KB", "128 KiB", "0.2 MB")
X = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(128, 128), nn.ReLU())]
    return nn.Sequential(*layers).eval()


def table(backend: str, **options: Any) -> SensitivityTable:
    """Measurements for a target, in 16 bits where it has them."""
    if backend in ("coreai", "coreml"):
        options.setdefault("precision", "float16")
    candidates: Any = ["int8"] if backend == "executorch" else [2, 4, 6, 8]
    return analyze(net(), (X,), candidates, [X], backend=backend, progress=False, **options)


def saved(recipe: Recipe, backend: str, folder: Path) -> int:
    """Bytes of the file, which is lowered and checked as the recipe says."""
    program = graphopt.compress(net(), (X,), recipe.to_config())
    return stored_size(program.save(folder / f"model{SUFFIXES[backend]}"))


def main(names: list[str]) -> None:
    write = sys.stdout.write
    write(
        "| target | asked | bytes asked | bytes got | share | layers |\n|---|---|---|---|---|---|\n"
    )
    for name in names:
        known = table(name)
        for budget in BUDGETS[name]:
            try:
                recipe = known.recipe(target_bytes=budget)
            except InfeasibleError as error:
                write(f"| {name} | {budget} | | {error} | | |\n")
                continue
            assert recipe.artifact is not None
            asked = recipe.artifact.max_bytes
            assert asked is not None
            with tempfile.TemporaryDirectory() as folder:
                got = saved(recipe, name, Path(folder))
            layers = ", ".join(f"{n} × {kind}" for kind, (n, _) in recipe.distribution.items())
            write(f"| {name} | {budget} | {asked:,} | {got:,} | {got / asked:.1%} | {layers} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:] or list(SUFFIXES))
