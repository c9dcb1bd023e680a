"""Tensors whose paths torch's graph modules cannot have get others, next to the model's."""

from __future__ import annotations

import keyword
import logging
from collections.abc import Iterable

from torch import nn
from torch.export import ExportedProgram

from graphopt.ir.captured_module import CapturedModule

__all__ = ["with_free_names"]

_log = logging.getLogger(__name__)
# what a graph module has beside a module, also as attributes of its instances
_TAKEN = frozenset({*dir(CapturedModule), "graph", "meta", "shape_env"} - {*dir(nn.Module)})


def with_free_names(exported: ExportedProgram) -> None:
    """Rename what a graph module cannot hold, in place; the tensors stay.

    A model may call a layer `graph`, `code` or `meta`, as graph modules call their own properties, and a key of
    a `ModuleDict` may be a keyword of Python, in which torch writes graphs down. Such a part of a path gets an
    underscore behind it.

    Args:
        exported: A program of one's own.
    """
    signature = exported.graph_signature
    renamed = _renamed([*exported.state_dict, *exported.constants])
    if not renamed:
        return
    for old, new in renamed.items():
        _log.warning(
            "%s is called %s in the program: torch's graphs cannot hold its name", old, new
        )
    for spec in (*signature.input_specs, *signature.output_specs):
        if spec.target is not None:
            spec.target = renamed.get(spec.target, spec.target)
    exported._state_dict = {renamed.get(n, n): each for n, each in exported.state_dict.items()}
    exported._constants = {renamed.get(n, n): each for n, each in exported.constants.items()}


def _renamed(paths: Iterable[str]) -> dict[str, str]:
    """Paths that cannot stay → their new ones."""
    split = {path: tuple(path.split(".")) for path in paths}
    siblings: dict[tuple[str, ...], set[str]] = {}
    for parts in split.values():
        for depth, part in enumerate(parts):
            siblings.setdefault(parts[:depth], set()).add(part)
    made: dict[str, str] = {}
    for path, parts in split.items():
        free = [_free(part, siblings[parts[:depth]], depth) for depth, part in enumerate(parts)]
        if free != list(parts):
            made[path] = ".".join(free)
    return made


def _free(part: str, siblings: set[str], depth: int) -> str:
    if not (keyword.iskeyword(part) or (depth == 0 and part in _TAKEN)):
        return part
    name = f"{part}_"
    while name in siblings or name in _TAKEN:
        name += "_"
    return name
