"""One thread at a time in what patches torch and converters for the whole process.

torch.export, decompositions and the converters set flags, configs, filters of warnings and streams that
all threads share. Whatever does so runs inside `exclusive`, which also gives the caller back what is
the process's: random states, environment variables and warnings filters. `patched` lets parts of a library be
others inside, and `silent` keeps what libraries write to the process's own streams from the terminal.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import random
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

__all__ = ["exclusive", "exclusively", "patched", "silent"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_lock = threading.RLock()
_FLAT_WEIGHTS = r"The tensor attributes? (self\.[\w.]*_flat_weights\[\d+\](, )?)+ w"
_YOUNG = 100_000  # new objects between two collections; a node of a graph is about twenty
_depth = 0  # of the thread that has the lock


@contextmanager
def exclusive() -> Iterator[None]:
    """Wait for other threads; give the process's state back when the outermost block ends."""
    global _depth
    with _lock:
        _depth += 1
        try:
            if _depth > 1:
                yield
            else:
                with _kept(), _set_aside():
                    yield
        finally:
            _depth -= 1


def exclusively(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that runs inside `exclusive`."""

    @functools.wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with exclusive():
            return function(*args, **kwargs)

    return alone


@contextmanager
def patched(owner: Any, **parts: Any) -> Iterator[None]:
    """Let attributes of a module or class be others inside.

    They are so for all threads, so it belongs inside `exclusive`.

    Args:
        owner: The module or class itself, not one that inherits them.
        parts: Name of an attribute → what it is inside.

    Raises:
        KeyError: It has no such attribute; nothing is changed then.
    """
    before = {name: vars(owner)[name] for name in parts}
    try:
        for name, part in parts.items():
            setattr(owner, name, part)
        yield
    finally:
        for name, part in before.items():
            setattr(owner, name, part)


@contextmanager
def _kept() -> Iterator[None]:
    environment = dict(os.environ)
    own, numbers, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    with warnings.catch_warnings():
        # torch.export warns of its own tree specs wherever it copies them, and of torch's own recurrent layers
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        warnings.filterwarnings("ignore", _FLAT_WEIGHTS, UserWarning)
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numbers)
            torch.set_rng_state(tensors)
            if devices is not None:
                torch.cuda.set_rng_state_all(devices)
            _restore(environment)


@contextmanager
def _set_aside() -> Iterator[None]:
    """Let collections of garbage pass over the objects that were there before.

    Graphs and programs are many small objects, so full collections come often; each would walk all that
    torch and the caller's program have made. Garbage that the block itself makes is collected as ever.
    """
    if gc.get_freeze_count():  # of the caller's own
        yield
        return
    often = gc.get_threshold()
    gc.freeze()
    if 0 < often[0] < _YOUNG:
        gc.set_threshold(_YOUNG, *often[1:])
    try:
        yield
    finally:
        gc.set_threshold(*often)
        gc.unfreeze()


def _restore(environment: dict[str, str]) -> None:
    for name in [name for name in os.environ if name not in environment]:
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


@contextmanager
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
