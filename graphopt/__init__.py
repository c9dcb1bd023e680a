"""graphopt: graph-rewriting compression of PyTorch models for edge targets."""

import sys

from graphopt import casting, errors, mixed_precision, moved, ops, pipelines, rdo
from graphopt.api import capture, compress, lower, tune
from graphopt.config.joint import JointConfig
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.program import CompressedProgram, Program
from graphopt.ir.records import CompressionTable, TensorRecord
from graphopt.specs import ExportBackend

__version__ = "0.1.0"

__all__ = [
    "CapturedModule",
    "CompressedProgram",
    "CompressionTable",
    "ExportBackend",
    "JointConfig",
    "Program",
    "TensorRecord",
    "__version__",
    "capture",
    "casting",
    "compress",
    "errors",
    "lower",
    "mixed_precision",
    "ops",
    "pipelines",
    "rdo",
    "tune",
]

moved.register(__name__)


def __getattr__(name: str) -> object:
    if name in moved.MOVED:
        return sys.modules[f"{__name__}.{name}"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
