"""The lines of code that nodes come from are read once for each line.

While a graph is traced, torch describes the whole stack of calls for each node, some eighty of them, to keep the few
of the model: a tenth of the time of an export.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import AbstractContextManager
from types import CodeType, FrameType, SimpleNamespace
from typing import Any

from torch.fx import proxy

from graphopt.exclusive import patched

__all__ = ["quick_traces"]

_Known = dict[tuple[CodeType, int], traceback.FrameSummary]


class _Stack:
    """What `CapturedTraceback` is of the stack that ends in a frame."""

    def __init__(self, frame: FrameType, known: _Known) -> None:
        self._frame: FrameType | None = frame
        self._known = known

    def summary(self) -> traceback.StackSummary:
        """Its calls, the outermost first."""
        stack, frame = traceback.StackSummary(), self._frame
        while frame is not None:
            code, place = frame.f_code, frame.f_lasti
            call = self._known.get((code, place))
            if call is None:
                call = traceback.FrameSummary(code.co_filename, frame.f_lineno, code.co_name)
                self._known[code, place] = call
            stack.append(call)
            frame = frame.f_back
        stack.reverse()
        return stack


def quick_traces() -> AbstractContextManager[None]:
    """Let torch note where nodes come from with each call of the stack described once.

    It patches torch for all threads, so it belongs inside `exclusive`.
    """
    known: _Known = {}
    by_torch: Any = vars(proxy)["CapturedTraceback"]

    def extract(**options: Any) -> Any:
        return by_torch.extract(**options) if options else _Stack(sys._getframe(1), known)

    return patched(proxy, CapturedTraceback=SimpleNamespace(extract=extract))
