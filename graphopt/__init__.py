"""graphopt: graph-rewriting compression of PyTorch models for edge targets."""

import sys
from typing import TYPE_CHECKING

from graphopt.loading import uncollected

with uncollected():
    from graphopt import errors, moved, ops
    from graphopt.audited import own_module
    from graphopt.capture import capture

if TYPE_CHECKING:
    from graphopt import (
        casting,
        mixed_precision,
        palettization,
        pipelines,
        pruning,
        quantization,
        rdo,
    )
    from graphopt.api import compress, fit, lower, tune
    from graphopt.backends.registry import ExportBackend
    from graphopt.compressors.compressed_program import CompressedProgram
    from graphopt.config.joint import JointConfig
    from graphopt.ir.captured_module import CapturedModule
    from graphopt.ir.mapped import mapped_weights
    from graphopt.ir.program import Program
    from graphopt.ir.records import TensorRecord
    from graphopt.report.table import CompressionTable
    from graphopt.run.batches import CallSequence
    from graphopt.run.workers import Workers
    from graphopt.search.budget.result import FitResult

__version__ = "0.2.0"

__all__ = [
    "CallSequence",
    "CapturedModule",
    "CompressedProgram",
    "CompressionTable",
    "ExportBackend",
    "FitResult",
    "JointConfig",
    "Program",
    "TensorRecord",
    "Workers",
    "__version__",
    "capture",
    "casting",
    "compress",
    "errors",
    "fit",
    "lower",
    "mapped_weights",
    "mixed_precision",
    "ops",
    "palettization",
    "pipelines",
    "pruning",
    "quantization",
    "rdo",
    "tune",
]

# name → module that defines it; imported when the name is first asked for
_MEMBERS = {
    "UntestedTorchVersionWarning": "graphopt.errors",
    "TorchaoTorchIncompatibilityWarning": "graphopt.errors",
    "DependencyVersionWarning": "graphopt.errors",
    "CoreMLExportError": "graphopt.errors",
    "CallSequence": "graphopt.run.batches",
    "CapturedModule": "graphopt.ir.captured_module",
    "CompressedProgram": "graphopt.compressors.compressed_program",
    "CompressionTable": "graphopt.report.table",
    "ExportBackend": "graphopt.backends.registry",
    "FitResult": "graphopt.search.budget.result",
    "JointConfig": "graphopt.config.joint",
    "Program": "graphopt.ir.program",
    "TensorRecord": "graphopt.ir.records",
    "Workers": "graphopt.run.workers",
    "compress": "graphopt.compressors.joint",
    "fit": "graphopt.search.budget.fit",
    "lower": "graphopt.backends.lowering",
    "mapped_weights": "graphopt.ir.mapped",
    "tune": "graphopt.passes.tune",
}
_PACKAGES = (
    "casting",
    "mixed_precision",
    "palettization",
    "pipelines",
    "pruning",
    "quantization",
    "rdo",
)

moved.register(__name__)


def __getattr__(name: str) -> object:
    if name in _MEMBERS:
        value = getattr(own_module(_MEMBERS[name]), name)
        globals()[name] = value
        return value
    if name in _PACKAGES:
        return own_module(f"{__name__}.{name}")
    if name in moved.MOVED:
        return sys.modules[f"{__name__}.{name}"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


moved.provide(__name__)
