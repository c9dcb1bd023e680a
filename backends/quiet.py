"""Keep the chatter of converters from the terminal."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

from graphopt.capture.export_errors import without_warnings
from graphopt.exclusive import exclusive, silent
from graphopt.ir.quick_graphs import quick_graphs

__all__ = ["quiet", "silent"]


@contextlib.contextmanager
def quiet(logger_name: str) -> Iterator[None]:
    """Silence a library's prints, bars, warnings and log lines below errors; errors still raise.

    Graphs that it makes on the way become code when it calls them.
    """
    sink = io.StringIO()
    with (
        exclusive(),
        quick_graphs(),
        without_warnings(logger_name),
        without_warnings("torch"),  # of what the library does with it, or imports
        contextlib.redirect_stderr(sink),
        contextlib.redirect_stdout(sink),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
