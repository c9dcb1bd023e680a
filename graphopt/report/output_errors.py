"""Errors of the outputs of single ops, over data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.errors import InputError
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import operands
from graphopt.run.batches import Batch
from graphopt.run.interpreter import Interpreter

__all__ = ["OutputErrors", "error_of", "sqnr"]


def errors_of(want: Any, got: Any) -> tuple[float, float]:
    """The same over all tensors of two structures."""
    pairs = zip(pytree.tree_leaves(want), pytree.tree_leaves(got), strict=True)
    sums = [error_of(a, b) for a, b in pairs if isinstance(a, Tensor)]
    return sum(energy for energy, _ in sums), sum(noise for _, noise in sums)


def error_of(want: Tensor, got: Tensor) -> tuple[float, float]:
    """Sum of squares and of squared differences; infinite where shapes differ."""
    if want.shape != got.shape:
        return float(want.double().square().sum()), math.inf
    exact = want.detach().double()
    gap = exact - got.detach().double()
    return float(exact.square().sum()), float(gap.square().sum())


def sqnr(energy: float, noise: float) -> float:
    """10·log10(energy / noise) in dB; inf without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(energy / noise) if energy > 0 and math.isfinite(noise) else -math.inf


class OutputErrors:
    """Energies and errors of the outputs of paired ops, summed over batches."""

    def __init__(
        self, exact: CapturedModule, found: CapturedModule, pairs: Sequence[tuple[fx.Node, fx.Node]]
    ) -> None:
        self.exact, self.found, self.pairs = exact, found, pairs
        self.sums = {one: [0.0, 0.0, 0.0] for one, _ in pairs}
        self.whole: list[list[float]] = []

    def add(self, batch: Batch) -> None:
        """Run one call through both graphs."""
        first = _Recorder(self.exact, {one for one, _ in self.pairs}).run_on(batch)
        second = _Recorder(self.found, {other for _, other in self.pairs}).run_on(batch)
        for one, other in self.pairs:
            want, got = first.values[one], second.values[other]
            energy, noise = errors_of(want, got)
            sums = self.sums[one]
            sums[0] += energy
            sums[1] += noise
            sums[2] += errors_of(want, _alone(one, other, first, second))[1]
        if len(first.outputs) != len(second.outputs):
            raise InputError(
                f"{len(first.outputs)} outputs before and {len(second.outputs)} after: the second"
                " program is not made from the first"
            )
        for place, (want, got) in enumerate(zip(first.outputs, second.outputs, strict=True)):
            if place == len(self.whole):
                self.whole.append([0.0, 0.0])
            energy, noise = error_of(want, got)
            self.whole[place][0] += energy
            self.whole[place][1] += noise

    def of(self, one: fx.Node) -> tuple[float, float]:
        """DB of an op's outputs in the whole program, and on exact inputs."""
        energy, noise, alone = self.sums[one]
        return sqnr(energy, noise), sqnr(energy, alone)

    def totals(self) -> tuple[float, ...]:
        """DB of each output of the whole."""
        return tuple(sqnr(*sums) for sums in self.whole)


def _alone(one: fx.Node, other: fx.Node, exact: _Recorder, found: _Recorder) -> Any:
    """The compressed op on the exact inputs: constants of the one, data of the other."""
    given: dict[fx.Node, Any] = {}
    for mine, theirs in zip(operands(other), operands(one), strict=False):
        held = mine in found.interpreter.constant or theirs in exact.interpreter.constant
        given[mine] = found.values[mine] if held else exact.values[theirs]
    return found.interpreter.call(other, given.__getitem__)


class _Recorder:
    """Keeps the outputs of some ops of a run and what they read, decoded weights included."""

    def __init__(self, gm: CapturedModule, kept: set[fx.Node]) -> None:
        self.interpreter = Interpreter(gm)
        self.kept = kept
        self.read = {operand for node in kept for operand in operands(node)}
        self.values: dict[fx.Node, Any] = {}
        self.outputs: list[Tensor] = []

    @torch.no_grad()
    def run_on(self, batch: Batch) -> _Recorder:
        hooks = {node: partial(self._keep, node) for node in self.kept | self.read}
        outputs = self.interpreter.run(batch, hooks)
        self.outputs = [each for each in outputs if isinstance(each, Tensor)]
        return self

    def _keep(self, node: fx.Node, value: Any) -> Any:
        self.values[node] = value
        return value
