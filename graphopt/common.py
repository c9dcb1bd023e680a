"""Names that coreai-opt has in its module of common ones."""

from graphopt.backends.registry import ExportBackend
from graphopt.errors import (
    CoreMLExportError,
    DependencyVersionWarning,
    TorchaoTorchIncompatibilityWarning,
    UntestedTorchVersionWarning,
)
from graphopt.specs.compression import CompressionType

__all__ = [
    "CompressionType",
    "CoreMLExportError",
    "DependencyVersionWarning",
    "ExportBackend",
    "TorchaoTorchIncompatibilityWarning",
    "UntestedTorchVersionWarning",
]
