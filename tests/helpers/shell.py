"""Commands as a user gives them, run in this process: importing torch anew costs seconds each."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from graphopt.cli.main import run


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code and the bytes of its streams."""

    returncode: int
    output: bytes
    errors: bytes

    @property
    def stdout(self) -> str:
        return self.output.decode()

    @property
    def stderr(self) -> str:
        return self.errors.decode()


def command(folder: Path, *words: str, stdin: bytes = b"") -> Done:
    """Run `graphopt WORDS` in a folder, with streams, arguments and warnings of its own."""
    source, out, err = (
        io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", write_through=True)
        for content in (stdin, b"", b"")
    )
    code = 0
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "stdin", source),
        mock.patch.object(sys, "argv", ["graphopt", *words]),
        mock.patch.dict(os.environ, {"COLUMNS": "80"}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")
        try:
            run()
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    return Done(code, out.buffer.getvalue(), err.buffer.getvalue())  # type: ignore[attr-defined]
