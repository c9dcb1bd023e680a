"""Pass: a frozen value object that rewrites a graph and can be run by any torch.fx pass manager."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from graphopt.errors import GraphOptError, PassError
from graphopt.ir.annotations import note_pass, passes_provided, passes_run
from graphopt.ir.editor import Editor

__all__ = ["Pass", "PassResult", "missing_passes"]

_log = logging.getLogger(__name__)


def missing_passes(step: Pass, gm: fx.GraphModule) -> list[str]:
    """Names of the passes that must come before `each` and have not run on `gm`."""
    seen = {*passes_run(gm), *passes_provided(gm)}
    return [needed.name for needed in step.after if needed.name not in seen]


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite. Fields are its options; `run` edits only through the editor.

    Attributes:
        name: Kebab-case name.
        after: Passes that must have run on the module before.
        provides: Passes in whose place this one may stand for others that come after it.
        tolerance: Largest max|a − b| / max|b| of the outputs by which the rewritten graph may differ
            from `expected`; None for a pass that changes values in a way that nothing predicts.
    """

    name: ClassVar[str]
    after: ClassVar[tuple[type[Pass], ...]] = ()
    provides: ClassVar[tuple[type[Pass], ...]] = ()
    tolerance: ClassVar[float | None] = 1e-5

    @abstractmethod
    def run(self, edit: Editor) -> None:
        """Rewrite the graph through `edit`."""

    def expected(self, before: fx.GraphModule, after: fx.GraphModule) -> fx.GraphModule:
        """A graph that computes what the rewritten one must; `before` itself for exact rewrites.

        Args:
            before: A copy of the graph before the pass, which may be changed.
            after: The rewritten graph.
        """
        del after
        return before

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Run on `gm` in place and leave a linted, compiled graph.

        What is computed from stored tensors alone then stands in front of its first reader.

        Raises:
            PassError: A pass that must come first has not run, or the result is not a valid graph.
        """
        missing = missing_passes(self, gm)
        if missing:
            raise PassError(f"pass {self.name!r} must come after {missing}; run these first")
        seen = passes_run(gm)
        edit = Editor(gm)
        try:
            self.run(edit)
            if edit.changed:
                edit.delay_constants()
                gm.graph.lint()
                gm.recompile()
        except GraphOptError as error:
            error.add_note(f"in pass {self.name!r}, after {list(seen)}")
            raise
        except RuntimeError as error:
            raise PassError(f"pass {self.name!r} left an invalid graph: {error}") from error
        note_pass(gm, self.name, [provided.name for provided in self.provides])
        _log.debug("%s: %s", self.name, "changed" if edit.changed else "unchanged")
        return PassResult(gm, edit.changed)
