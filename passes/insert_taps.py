"""Watch the gradients at the ops of chosen weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from graphopt.fitting.sensitivity import GradientCollector
from graphopt.fitting.sensitivity.taps import insert_taps
from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass

__all__ = ["InsertTaps"]


@dataclass(frozen=True)
class InsertTaps(Pass):
    """Put a tap behind every op that reads one of the weights.

    Before:
        %y = linear(%x, %w)
        %z = relu(%y)

    After:
        %y = linear(%x, %w)
        %t = _taps.linear(%x, %y)
        %z = relu(%t)

    A weight that some op reads in a form that cannot be told apart by samples gets one tap behind
    itself.

    Attributes:
        collector: What the taps report to.
        names: Names of the weights.

    Examples:
        >>> from graphopt.fitting.sensitivity.collector import GradientCollector
        >>> collector, module = GradientCollector(), program.module()
        >>> InsertTaps(collector, ["0.weight"])(module).modified
        True
        >>> module(batches[0]).square().mean().backward()
        >>> {name: tuple(total.shape) for name, total in collector.sums.items()}
        {'0.weight': (8, 16)}
    """

    name: ClassVar[str] = "insert-taps"
    collector: GradientCollector
    names: Sequence[str]

    @override
    def run(self, edit: Editor) -> None:
        insert_taps(edit, self.collector, self.names)
