"""What a target offers to be a delegate inside an ExecuTorch program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.export import ExportedProgram

from graphopt.backends.options import TargetOptions
from graphopt.ir.program import Program

__all__ = ["Delegate", "Payload"]


@dataclass(frozen=True)
class Payload:
    """What a .pte holds for one delegate.

    Attributes:
        data: Its own bytes.
        named: Further data of the file by name.
    """

    data: bytes
    named: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Delegate(ABC):
    """A target's part in lowering to ExecuTorch, and in evaluating what was written.

    Attributes:
        id: The delegate's name in a .pte.
        options: Those of the target.
    """

    id: ClassVar[str]
    options: TargetOptions

    @abstractmethod
    def export(self, program: Program) -> ExportedProgram:
        """The program in the target's form, as the partitioner wants it.

        Raises:
            LoweringError: The target cannot hold it.
        """

    @abstractmethod
    def partitioner(self) -> Any:
        """ExecuTorch's partitioner of the target."""

    def edge_options(self) -> dict[str, Any]:
        """Further arguments of `to_edge_transform_and_lower`."""
        return {}

    def finish(self, edge: Any) -> None:  # noqa: B027 - most targets have nothing to do
        """Change the lowered program before it is written."""

    @abstractmethod
    def run(self, payload: Payload, inputs: Sequence[Tensor], folder: Path) -> list[Tensor]:
        """Evaluate a payload.

        Args:
            payload: As it stands in the file.
            inputs: In the delegate's order.
            folder: An empty folder to unpack into.

        Returns:
            Outputs in the delegate's order.

        Raises:
            VerificationError: It cannot be evaluated.
        """
