"""Keep what libraries write to the process's own streams from the terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator

from graphopt.exclusive import exclusive

__all__ = ["silent"]


@contextlib.contextmanager
def silent() -> Iterator[Callable[[], str]]:
    """Silence what a library's compiled parts write to the process's own streams, too.

    Handlers that a library adds to the root logger are removed again. The streams are those of the
    whole process, so nothing else should write to them meanwhile.

    Yields:
        A function that gives the text written so far.
    """
    with exclusive():
        yield from _silenced()


def _silenced() -> Iterator[Callable[[], str]]:
    sys.stdout.flush()
    sys.stderr.flush()
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    with tempfile.TemporaryFile() as sink, open(sink.fileno(), "w", closefd=False) as text:
        saved = [os.dup(1), os.dup(2)]
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        logging.disable(logging.WARNING)

        def said() -> str:
            text.flush()
            sink.seek(0)
            return sink.read().decode(errors="replace").strip()

        try:
            with (
                warnings.catch_warnings(),
                contextlib.redirect_stdout(text),  # it need not be the process's own
                contextlib.redirect_stderr(text),
            ):
                warnings.simplefilter("ignore")
                yield said
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, stream)
                os.close(copy)
            logging.disable(disabled)
            for handler in [other for other in root.handlers if other not in handlers]:
                root.removeHandler(handler)
            root.setLevel(level)
