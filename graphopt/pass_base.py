"""Pass: a frozen value object that rewrites a graph and can be run by any torch.fx pass manager."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from graphopt.editor import Editor
from graphopt.errors import GraphOptError, PassError

__all__ = ["Pass", "PassResult", "passes_run"]

_RUN = "graphopt.passes"
_log = logging.getLogger(__name__)


def passes_run(gm: fx.GraphModule) -> tuple[str, ...]:
    """Names of our passes that this module has seen, in order."""
    return tuple(gm.meta.get(_RUN, ()))


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite. Fields are its options; `run` edits only through the editor.

    Attributes:
        name: Kebab-case name.
        after: Passes that must have run on the module before.
    """

    name: ClassVar[str]
    after: ClassVar[tuple[type[Pass], ...]] = ()

    @abstractmethod
    def run(self, edit: Editor) -> None:
        """Rewrite the graph through `edit`."""

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Run on `gm` in place and leave a linted, compiled graph.

        Raises:
            PassError: A pass that must come first has not run, or the result is not a valid graph.
        """
        seen = passes_run(gm)
        missing = [needed.name for needed in self.after if needed.name not in seen]
        if missing:
            raise PassError(f"pass {self.name!r} must come after {missing}; run these first")
        edit = Editor(gm)
        try:
            self.run(edit)
            if edit.changed:
                gm.graph.lint()
                gm.recompile()
        except GraphOptError as error:
            error.add_note(f"in pass {self.name!r}, after {list(seen)}")
            raise
        except RuntimeError as error:
            raise PassError(f"pass {self.name!r} left an invalid graph: {error}") from error
        gm.meta[_RUN] = (*seen, self.name)
        _log.debug("%s: %s", self.name, "changed" if edit.changed else "unchanged")
        return PassResult(gm, edit.changed)
