"""CompressionTable: the record of what was done, for printing and as a page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from torch.export import ExportedProgram
from typing_extensions import Unpack

from graphopt.errors import StateError
from graphopt.extras import deferred
from graphopt.ir.annotations import record_of
from graphopt.ir.program import Program
from graphopt.ir.records import CompressionRecord
from graphopt.report.bits import stored_tensors
from graphopt.report.notebook import ShownAsTable

if TYPE_CHECKING:
    from rich.table import Table

    from graphopt.report import page, table_view
    from graphopt.report.page import PageKeywords
else:
    page = deferred("graphopt.report.page")
    table_view = deferred("graphopt.report.table_view")

__all__ = ["CompressionTable", "table_of"]


@dataclass(frozen=True)
class CompressionTable(CompressionRecord, ShownAsTable):
    """What every compressor returns; prints as a table.

    Attributes:
        program: The program that this reports on, where it is one's report.

    Examples:
        >>> table = graphopt.compress(model, example, {"palettization": {}}).report()
        >>> [row.name for row in table]
        ['0.weight', '2.weight']
    """

    program: Program | None = field(default=None, compare=False, repr=False)
    _width: ClassVar[int] = 140

    __repr__ = CompressionRecord.__repr__

    def to_html(
        self,
        path: str | Path,
        *,
        before: nn.Module | ExportedProgram | Program | None = None,
        data: Iterable[Any] | None = None,
        **options: Unpack[PageKeywords],
    ) -> Path:
        """Write a self-contained page about the program that this is the report of.

        Args:
            path: An .html file.
            before: The model, for sizes and errors of each layer.
            data: Inputs of one call each, for errors of outputs; needs `before`.
            options: As for `graphopt.inspection.write_page`.

        Raises:
            StateError: The table is no program's report.
        """
        if self.program is None:
            raise StateError("call to_html() on program.report(); a table alone has no weights")
        return page.write_page(self.program, path, before=before, data=data, **options)

    def activation_table(self) -> Table:
        """The activations, for printing."""
        return table_view.activations(self)

    def __rich__(self) -> Table:
        return table_view.weights(self)


def table_of(program: Program) -> CompressionTable:
    """The record of a program, for printing, with what the program stores beside its rows."""
    record = record_of(program.graph_module)
    listed = {name for row in record.rows for name in (row.name, *row.aliases)}
    stored = stored_tensors(program.graph_module)
    rest = [each for name, each in stored.items() if not each.compressed and name not in listed]
    return CompressionTable(
        record.rows,
        record.warnings,
        record.activations,
        rest_bits=sum(each.bits for each in rest),
        rest_elements=sum(each.elements for each in rest),
        program=program,
    )
