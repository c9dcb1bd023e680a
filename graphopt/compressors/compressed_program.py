"""CompressedProgram: what passes made of a program, as one that can be reported and saved."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from graphopt.backends.lowering import lower_by_suffix
from graphopt.extras import deferred
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.editor import Editor
from graphopt.ir.mapped import is_mapped
from graphopt.ir.ops import is_ours
from graphopt.ir.program import Program
from graphopt.ir.program_set import ProgramSet
from graphopt.passes.pass_manager import PassReport
from graphopt.report.passes import PassTable
from graphopt.specs.artifact import ArtifactSpec

if TYPE_CHECKING:
    from graphopt.report import table as tables
    from graphopt.report.table import CompressionTable
else:
    tables = deferred("graphopt.report.table")

__all__ = ["CompressedProgram", "CompressedSet", "compressed"]


@dataclass(frozen=True)
class CompressedProgram(Program):
    """A converted program with the table of what was done to it.

    Attributes:
        pass_report: What each pass did, where a pipeline made the program.

    Examples:
        >>> program = graphopt.compress(model, example, {"palettization": {}})
        >>> isinstance(program, CompressedProgram), len(program.report())
        (True, 2)
    """

    pass_report: PassTable | None = None

    # a dataclass would make one of its own, with every tensor
    __repr__ = Program.__repr__

    def report(self) -> CompressionTable:
        """One row per candidate tensor; prints as a table, with `to_json()` and `to_html(path)`."""
        return tables.table_of(self)

    @property
    @override
    def table(self) -> CompressionTable:
        """The report."""
        return self.report()

    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        verify: bool | Iterable[Any] = True,
    ) -> Path:
        """Lower to the target that the suffix names, compare with PyTorch and save.

        A program of a recipe is lowered as the recipe says, and saved within its budget.

        Args:
            path: Where to; it ends in .aimodel, .mlpackage, .pte or .pt2.
            overwrite: Replace what is there.
            verify: As for `Artifact.save`: calls to compare on, True for the example, False for none.

        Raises:
            LoweringError: The target cannot hold it, or no target has such files.
            ArtifactExistsError: The path exists and `overwrite` is False.
            VerificationError: The artifact computes something else; nothing is written.
            InfeasibleError: The file has more bytes than the recipe's budget; nothing is written.
        """
        artifact = lower_by_suffix(self, Path(path).suffix)
        return Path(artifact.save(path, overwrite=overwrite, verify=verify))


@dataclass(frozen=True)
class CompressedSet(ProgramSet):
    """Converted entry points with the table of what was done to what they share.

    Attributes:
        whole: All of them in one program.
    """

    whole: CompressedProgram

    __repr__ = ProgramSet.__repr__

    def report(self) -> CompressionTable:
        """One row per candidate tensor, as for `CompressedProgram`."""
        return self.whole.report()


def compressed(
    program: Program,
    pass_report: PassReport | None = None,
    artifact: ArtifactSpec | None = None,
) -> CompressedProgram:
    """What passes made of a program, as one that can be reported and saved.

    Args:
        program: The converted program; the result shares nothing with it but codes.
        pass_report: What the passes did.
        artifact: The file that it is for; None is the program's own.
    """
    return CompressedProgram(
        graph_module=_copied(program.graph_module),
        example_args=program.example_args,
        example_kwargs=program.example_kwargs,
        provenance=program.provenance,
        pass_report=None if pass_report is None else PassTable(pass_report.records),
        artifact=program.artifact if artifact is None else artifact,
    )


def _copied(module: CapturedModule) -> CapturedModule:
    """The original weights are gone by now: what is copied is small, and what lies in files stays there.

    Codes are shared with what was prepared: nothing ever writes into them.
    """
    tensors = (*module.parameters(), *module.buffers())
    shared: dict[int, Any] = {id(tensor): tensor for tensor in tensors if is_mapped(tensor)}
    edit = Editor(module)
    for node in edit.constants():
        if node.users and all(is_ours(user) for user in node.users):
            value = edit.value(node)
            if value.dtype in (torch.uint8, torch.int8):
                shared[id(value)] = value
    return copy.deepcopy(module, shared)
