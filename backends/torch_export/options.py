"""Options of exporting programs in our own ops."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.backends.options import TargetOptions

__all__ = ["TorchOptions"]


@dataclass(frozen=True, kw_only=True)
class TorchOptions(TargetOptions):
    """What Torch's `lower` takes.

    Attributes:
        dynamic: Leave the dimensions open that the graph leaves open.
        stack_traces: Keep the lines of the model's source that each op comes from.
    """

    dynamic: bool = True
    stack_traces: bool = False
