"""The registry of targets: one row each, read by everything that names or offers them.

A target is a folder beside this file with a `Backend` in it, a row of `ExportBackend`, an extra in
pyproject.toml (and the folder's name in the two lists of packages there), and a folder of tests.

Another package adds a target by an entry point of the group `graphopt.backends`: its name is the target's,
and it points at a tuple of suffix, extra and "module:class", in a module that does not import graphopt.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from enum import StrEnum
from importlib.metadata import entry_points
from typing import Any, Self

from graphopt.audited import module_of
from graphopt.errors import LoweringError

__all__ = [
    "DEFAULT",
    "ENTRY_POINTS",
    "NEUTRAL",
    "ExportBackend",
    "Target",
    "target_of",
    "target_of_class",
    "target_of_suffix",
    "targets",
]

_log = logging.getLogger(__name__)
ENTRY_POINTS = "graphopt.backends"


class Target(StrEnum):
    """What is to be known of a target before its code is imported: a row of the registry.

    Attributes:
        suffix: What the paths of its artifacts end in.
        extra: The extra of pyproject.toml that installs its toolchain; "" where it needs none.
        backend: Its `Backend`, as "module:class".

    Examples:
        >>> isinstance(graphopt.ExportBackend.ONNX, Target), graphopt.ExportBackend.ONNX.extra
        (True, 'onnx')
    """

    suffix: str
    extra: str
    backend: str

    def __new__(cls, name: str, suffix: str, extra: str, backend: str) -> Self:
        """A row.

        Args:
            name: What Python, YAML and the shell call it.
            suffix: See the class.
            extra: See the class.
            backend: See the class.
        """
        row = str.__new__(cls, name)
        row._value_ = name
        row.suffix, row.extra, row.backend = suffix, extra, backend
        return row


def _installed(rows: Mapping[str, Any]) -> dict[str, tuple[str, str, str, str]]:
    """Rows of targets in other packages, without those that cannot be read or are here already."""
    known = [row for row in rows.values() if isinstance(row, tuple)]
    taken = {entry for row in known for entry in row[:2]} | set(rows)
    found = {}
    for point in entry_points(group=ENTRY_POINTS):
        try:
            module, _, row = point.value.partition(":")
            suffix, extra, backend = getattr(module_of(module), row)
        except Exception as error:
            _log.warning("target %s (%s) is left out: %s", point.name, point.value, error)
            continue
        if {point.name, suffix} & taken:
            _log.warning("target %s (%s) is left out: there is one", point.name, point.value)
            continue
        taken |= {point.name, suffix}
        found[point.name] = (point.name, suffix, extra, backend)
    return found


class ExportBackend(Target):
    """A target toolchain; installed ones of other packages have members, too.

    Examples:
        >>> ExportBackend("coreml") is ExportBackend.CoreML, ExportBackend.CoreML.suffix
        (True, '.mlpackage')
    """

    CoreAI = ("coreai", ".aimodel", "coreai", "graphopt.backends.coreai.backend:CoreAIBackend")
    CoreML = ("coreml", ".mlpackage", "coreml", "graphopt.backends.coreml.backend:CoreMLBackend")
    ExecuTorch = (
        "executorch",
        ".pte",
        "executorch",
        "graphopt.backends.executorch.backend:ExecuTorchBackend",
    )
    ONNX = ("onnx", ".onnx", "onnx", "graphopt.backends.onnx.backend:ONNXBackend")
    Torch = ("torch", ".pt2", "", "graphopt.backends.torch_export.backend:TorchBackend")
    vars().update(_installed(vars()))


# coreai-opt's earlier names, which no list of targets has
setattr(ExportBackend, "MIL", ExportBackend.CoreML)  # noqa: B010
setattr(ExportBackend, "MLIR", ExportBackend.CoreAI)  # noqa: B010
_EARLIER = {"mil": ExportBackend.CoreML, "mlir": ExportBackend.CoreAI}
DEFAULT = ExportBackend.CoreAI  # what compressors finalize for, as in coreai-opt
NEUTRAL = ExportBackend.Torch  # keeps our own ops; its artifacts are inputs again


def targets() -> tuple[Target, ...]:
    """All rows, in their order."""
    return tuple(ExportBackend)


def target_of(name: Target | str) -> Target:
    """The row of a target.

    Args:
        name: An `ExportBackend` or its value, such as "coreai".

    Raises:
        LoweringError: There is no such target.
    """
    name = _EARLIER.get(str(name), name)
    for target in targets():
        if target.value == name:
            return target
    names = [target.value for target in targets()]
    raise LoweringError(f"no backend {name!r}; there are {names}")


def target_of_suffix(suffix: str) -> Target:
    """The row of the target whose artifacts end in `suffix`.

    Raises:
        LoweringError: No target's do.
    """
    for target in targets():
        if target.suffix == suffix:
            return target
    known = sorted(target.suffix for target in targets())
    raise LoweringError(f"no target for {suffix!r}; use one of {known}")


def target_of_class(backend: type) -> Target:
    """The row that names a backend's class, or the class that it derives from.

    Raises:
        LoweringError: None does.
    """
    for base in backend.__mro__:
        for target in targets():
            if target.backend == f"{base.__module__}:{base.__qualname__}":
                return target
    raise LoweringError(f"{backend.__qualname__} has no row in graphopt.backends.registry")
