"""graphopt: graph-rewriting compression of PyTorch models for edge targets."""

from graphopt import casting, errors, mixed_precision, ops, pipelines, rdo
from graphopt.api import lower
from graphopt.capture import capture
from graphopt.captured_module import CapturedModule
from graphopt.config.joint import JointConfig
from graphopt.joint import compress
from graphopt.program import CompressedProgram, Program
from graphopt.specs import ExportBackend
from graphopt.table import CompressionTable, TensorRecord
from graphopt.tuning import tune

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
