"""ExportBackend: the names of the targets that a program can be lowered to."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["ExportBackend"]


class ExportBackend(StrEnum):
    """A target toolchain."""

    CoreAI = "coreai"
    CoreML = "coreml"
    ExecuTorch = "executorch"
    Torch = "torch"
