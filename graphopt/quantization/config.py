"""Configs of quantization under coreai-opt's module path."""

from graphopt import moved
from graphopt.config.quantization import (
    ExecutionMode,
    KVCacheQuantConfig,
    ModuleQuantizerConfig,
    OpQuantizerConfig,
    QATSchedule,
    QuantizerConfig,
)
from graphopt.errors import InvalidExecutionModeError

__all__ = [
    "ExecutionMode",
    "InvalidExecutionModeError",
    "KVCacheQuantConfig",
    "ModuleQuantizerConfig",
    "OpQuantizerConfig",
    "QATSchedule",
    "QuantizerConfig",
]

moved.provide(__name__)
