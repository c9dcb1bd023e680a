"""Fourier transforms of real and imaginary parts, as products with matrices of cosines and sines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.editor import Editor

__all__ = ["NoPartsError", "Parts", "Transforms"]

_aten = torch.ops.aten
Parts = tuple[fx.Node, fx.Node]


class NoPartsError(Exception):
    """An op on complex numbers is not known as one on their parts."""


class Transforms:
    """Writes transforms into a graph; matrices are held once.

    Args:
        edit: The graph's editor.
    """

    def __init__(self, edit: Editor) -> None:
        self.edit = edit
        self._matrices: dict[tuple[Any, ...], Parts] = {}

    def of_complex(self, node: fx.Node, parts: Parts) -> Parts:
        """What `aten._fft_c2c` gives.

        Args:
            node: The call.
            parts: Of its operand.

        Raises:
            NoPartsError: A size is open.
        """
        _, axes, norm, forward = node.args
        return self._turned(node, parts, axes, _Scale.of(parts[0], axes, norm), forward)  # type: ignore[arg-type]

    def of_real(self, node: fx.Node) -> Parts:
        """What `aten._fft_r2c` gives.

        Args:
            node: The call.

        Raises:
            NoPartsError: A size is open.
        """
        arguments: Any = node.args
        x, axes, norm, onesided = arguments
        scale = _Scale.of(x, axes, norm)
        *others, last = axes
        size = scale.sizes[-1]
        shape = (size, size // 2 + 1 if onesided else size)
        turns = self._turns(node, shape, scale.value, _kind(x))
        real, sines = (self._product(node, x, matrix, last) for matrix in turns)
        imag = self._call(node, _aten.neg.default, sines)
        return self._turned(node, (real, imag), others, _Scale((), 1.0), True)

    def to_real(self, node: fx.Node, parts: Parts) -> fx.Node:
        """What `aten._fft_c2r` gives.

        Args:
            node: The call.
            parts: Of its operand.

        Raises:
            NoPartsError: A size is open.
        """
        arguments: Any = node.args
        _, axes, norm, size = arguments
        *others, last = axes
        scale = _Scale.of(parts[0], axes, norm, size)
        parts = self._turned(node, parts, others, _Scale((), 1.0), False)
        # all but the first and, of an even number, the middle frequency stand for two
        shape = (scale.sizes[-1] // 2 + 1, scale.sizes[-1])
        turns = self._turns(node, shape, scale.value, _kind(parts[0]), twice=True)
        cosines, sines = (
            self._product(node, part, matrix, last)
            for part, matrix in zip(parts, turns, strict=True)
        )
        return self._call(node, _aten.sub.Tensor, cosines, sines)

    def _call(self, node: fx.Node, target: Any, *args: Any) -> fx.Node:
        return self.edit.call(target, *args, like=node)

    def _turned(
        self, node: fx.Node, parts: Parts, axes: Sequence[int], scale: _Scale, forward: bool
    ) -> Parts:
        """Transforms along axes, one after the other."""
        real, imag = parts
        for place, axis in enumerate(axes):
            size = real.meta["val"].shape[axis]
            shape = (_known(size), _known(size))
            turns = self._turns(node, shape, 1.0 if place else scale.value, _kind(real))
            (a, b), (c, d) = (
                [self._product(node, part, matrix, axis) for matrix in turns]
                for part in (real, imag)
            )
            plus, minus = (_aten.add.Tensor, _aten.sub.Tensor)[:: 1 if forward else -1]
            real, imag = self._call(node, plus, a, d), self._call(node, minus, c, b)
        return real, imag

    def _turns(
        self,
        node: fx.Node,
        shape: tuple[int, int],
        scale: float,
        kind: torch.dtype,
        *,
        twice: bool = False,
    ) -> Parts:
        """Matrices of cosines and of sines, the same ones where they are asked for again."""
        key = (shape, scale, kind, twice)
        if key not in self._matrices:
            size = max(shape)
            places = [torch.arange(count, dtype=torch.float64) for count in shape]
            angles = torch.outer(*places) % size * (2 * math.pi / size)
            factor = torch.full((shape[0], 1), scale, dtype=torch.float64)
            if twice:
                factor[1 : (size + 1) // 2] *= 2
            cosines, sines = (
                self.edit.constant(f"{name}_{size}", (factor * values).to(kind), like=node)
                for name, values in (("cosines", angles.cos()), ("sines", angles.sin()))
            )
            self._matrices[key] = cosines, sines
        return self._matrices[key]

    def _product(self, node: fx.Node, x: Any, matrix: fx.Node, axis: int) -> fx.Node:
        """The product of an axis of a value with a matrix."""
        last = x.meta["val"].dim() - 1
        if axis % (last + 1) == last:
            return self._call(node, _aten.matmul.default, x, matrix)
        moved = self._call(node, _aten.transpose.int, x, axis, last)
        made = self._call(node, _aten.matmul.default, moved, matrix)
        return self._call(node, _aten.transpose.int, made, axis, last)


@dataclass(frozen=True)
class _Scale:
    """Sizes of transforms, and what their results are multiplied by.

    Attributes:
        sizes: Along each axis.
        value: The factor.
    """

    sizes: tuple[int, ...]
    value: float

    @classmethod
    def of(cls, x: fx.Node, axes: Sequence[int], norm: int, last: Any = None) -> _Scale:
        """By torch's numbers for norms: 0 is none, 1 by the root of the elements, 2 by them."""
        sizes = [_known(x.meta["val"].shape[axis]) for axis in axes]
        if last is not None:
            sizes[-1] = _known(last)
        return cls(tuple(sizes), math.prod(sizes) ** (-norm / 2))


def _known(size: Any) -> int:
    if not isinstance(size, int):
        raise NoPartsError("a Fourier transform of open size")
    return size


def _kind(x: Any) -> torch.dtype:
    kind: torch.dtype = x.meta["val"].dtype
    return kind
