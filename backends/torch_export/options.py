"""Options of exporting programs in our own ops."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.backends.options import TargetOptions
from graphopt.backends.shapes import Shapes

__all__ = ["TorchOptions"]


@dataclass(frozen=True, kw_only=True)
class TorchOptions(TargetOptions):
    """What Torch's `lower` takes.

    Attributes:
        dynamic: Leave the dimensions open that the graph leaves open.
        shapes: Sizes of the inputs that the artifact takes: "captured", those that the capture leaves
            open, as `dynamic` says; "open", the same and compared at three sizes; "example"; or
            bounds or shapes by input, see `backends.shapes`, the shapes being
            taken as bounds.
        stack_traces: Keep the lines of the model's source that each op comes from.
    """

    dynamic: bool = True
    shapes: Shapes = "captured"
    stack_traces: bool = False
