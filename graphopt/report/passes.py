"""PassTable: what the passes of a pipeline did, for printing and in notebooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphopt.extras import deferred
from graphopt.passes.pass_manager import PassReport
from graphopt.report.notebook import ShownAsTable

if TYPE_CHECKING:
    from rich import console
    from rich import table as tables
else:
    console, tables = deferred("rich.console"), deferred("rich.table")

__all__ = ["PassTable"]


@dataclass(frozen=True)
class PassTable(PassReport, ShownAsTable):
    """A pipeline's report; prints as a table."""

    __repr__ = PassReport.__repr__

    def __rich__(self) -> tables.Table:
        table = tables.Table(title=f"{len(self.records)} passes, {self.seconds:.2f} s")
        for heading in ("pass", "changed", "ms", "nodes", "error", "allowed"):
            table.add_column(heading, justify="left" if heading == "pass" else "right")
        for record in self.records:
            table.add_row(
                record.name,
                "yes" if record.modified else "",
                f"{1e3 * record.seconds:.1f}",
                f"{record.nodes_before} → {record.nodes_after}",
                *(
                    "" if number is None else f"{number:.1e}"
                    for number in (record.error, record.tolerance)
                ),
            )
        return table
