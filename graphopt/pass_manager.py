"""Run a pipeline of passes, with an optional dump of the graph after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import fx

from graphopt.pass_base import PassResult

__all__ = ["run_passes"]


def run_passes(
    gm: fx.GraphModule,
    passes: Sequence[Callable[[fx.GraphModule], PassResult | None]],
    *,
    dump_to: Path | None = None,
) -> bool:
    """Run `passes` in order on `gm`, in place.

    Args:
        gm: What to rewrite.
        passes: Ours, or any callable in torch.fx's pass form.
        dump_to: Folder that gets one readable graph per pass, numbered.

    Returns:
        Whether any pass changed the graph.
    """
    changed = False
    for number, each in enumerate(passes):
        result = each(gm)
        changed |= bool(result is not None and result.modified)
        if dump_to is not None:
            dump_to.mkdir(parents=True, exist_ok=True)
            name = getattr(each, "name", type(each).__name__)
            (dump_to / f"{number:02d}-{name}.txt").write_text(gm.print_readable(print_output=False))
    return changed
