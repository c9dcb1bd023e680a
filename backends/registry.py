"""The registry of targets: one row each, read by everything that names or offers them.

A target is a folder beside this file with a `Backend` in it, a row of `ExportBackend`, an extra in
pyproject.toml (and the folder's name in the two lists of packages there), and a folder of tests.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from graphopt.errors import LoweringError

__all__ = [
    "DEFAULT",
    "NEUTRAL",
    "ExportBackend",
    "Target",
    "target_of",
    "target_of_class",
    "target_of_suffix",
    "targets",
]


class Target(StrEnum):
    """What is to be known of a target before its code is imported: a row of the registry.

    Attributes:
        suffix: What the paths of its artifacts end in.
        extra: The extra of pyproject.toml that installs its toolchain; "" where it needs none.
        backend: Its `Backend`, as "module:class".
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


class ExportBackend(Target):
    """A target toolchain."""

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
