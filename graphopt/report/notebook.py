"""Tables as notebooks show them."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from graphopt.extras import deferred

if TYPE_CHECKING:
    from rich import table as tables
    from rich import text
else:
    tables, text = deferred("rich.table"), deferred("rich.text")

__all__ = ["ShownAsTable", "table_html"]


class ShownAsTable(ABC):
    """What prints as a table and is one in notebooks, too."""

    @abstractmethod
    def __rich__(self) -> tables.Table:
        """The table."""

    def _repr_html_(self) -> str:
        return table_html(self.__rich__())


def table_html(table: tables.Table) -> str:
    """A table of the terminal as one of HTML, in the notebook's own style."""
    sides = [f" style='text-align:{column.justify}'" for column in table.columns]
    heads = "".join(
        f"<th{side}>{_text(column.header)}</th>"
        for side, column in zip(sides, table.columns, strict=True)
    )
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = "".join(
        "<tr>"
        + "".join(f"<td{side}>{_text(cell)}</td>" for side, cell in zip(sides, row, strict=True))
        + "</tr>"
        for row in rows
    )
    title = f"<caption>{_text(table.title)}</caption>" if table.title else ""
    return f"<table>{title}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _text(cell: object) -> str:
    """A cell without the terminal's markup."""
    shown = text.Text.from_markup(cell) if isinstance(cell, str) else cell
    return html.escape(shown.plain if isinstance(shown, text.Text) else str(shown))
