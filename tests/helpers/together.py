"""Several calls as one program, as most of the time that a call takes is that of its program."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["Together", "in_groups", "together"]


class _Part(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


class Together(nn.Module):
    """Modules beside each other; each takes its share of the inputs, the result has all outputs."""

    def __init__(self, parts: Iterable[nn.Module], lengths: Iterable[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.lengths = list(lengths)

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        pairs = zip(self.parts, self.lengths, strict=True)
        return [part(*itertools.islice(given, length)) for part, length in pairs]


def in_groups(names: Iterable[str], size: int) -> list[Any]:
    """Parameter sets of `size` names each, with all of them as the id."""
    import pytest

    every = list(names)
    groups = [every[first : first + size] for first in range(0, len(every), size)]
    return [pytest.param(group, id=", ".join(group)) for group in groups]


def together(
    cases: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]], names: Iterable[str]
) -> tuple[nn.Module, tuple[Any, ...]]:
    """A module that computes the named cases, and its inputs."""
    chosen = [cases[name] for name in names]
    parts = [
        function if isinstance(function, nn.Module) else _Part(function) for function, _ in chosen
    ]
    lengths = [len(args) for _, args in chosen]
    return Together(parts, lengths).eval(), tuple(x for _, args in chosen for x in args)
