"""Tables as terminals, files and notebooks show them."""

from __future__ import annotations

import html
import io
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from graphopt.extras import deferred

if TYPE_CHECKING:
    from rich import console, text
    from rich import table as tables
else:
    console, text = deferred("rich.console"), deferred("rich.text")
    tables = deferred("rich.table")

__all__ = ["ShownAsTable", "table_html"]


class ShownAsTable(ABC):
    """What prints as a table, or as several, and is one in notebooks, too."""

    _width: ClassVar[int] = 120  # characters of a line of text

    @abstractmethod
    def __rich__(self) -> tables.Table | console.Group:
        """The table, or what stands below one another."""

    @override
    def __str__(self) -> str:
        stream = io.StringIO()
        console.Console(file=stream, width=self._width, no_color=True).print(self)
        return stream.getvalue()

    def _repr_html_(self) -> str:
        shown = self.__rich__()
        parts = shown.renderables if isinstance(shown, console.Group) else [shown]
        return "".join(
            table_html(part) if isinstance(part, tables.Table) else f"<p>{_text(part)}</p>"
            for part in parts
        )


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
