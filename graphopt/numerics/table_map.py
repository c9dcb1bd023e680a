"""Which table serves which weight of a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["TableMap"]

_Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TableMap:
    """Which table serves which weight of a matrix [rows, columns].

    Attributes:
        rows: Table of each unit of rows, int64.
        columns: Offset that each column adds, int64.
        size: Rows per unit, the length of a table entry.
    """

    rows: _Indices
    columns: _Indices
    size: int

    @classmethod
    def of(cls, tables: Tensor, size: int = 1) -> TableMap | None:
        """The map of a matrix of table numbers; None where they are no sum of row and column.

        Args:
            tables: Table of each unit of rows and of each column, [units, columns] int64.
            size: Rows per unit.
        """
        rows, columns = tables[:, 0], tables[0] - tables[0, 0]
        if bool((tables != rows[:, None] + columns[None]).any()):
            return None
        return cls(rows.numpy(), columns.numpy(), size)

    @property
    def by_rows(self) -> bool:
        """Whether every row has one table."""
        return not self.columns.any()
