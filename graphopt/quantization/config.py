"""Configs of quantization under coreai-opt's module path."""

from graphopt.config.quantization import (
    ExecutionMode,
    KVCacheQuantConfig,
    ModuleQuantizerConfig,
    OpQuantizerConfig,
    QATSchedule,
    QuantizerConfig,
)

__all__ = [
    "ExecutionMode",
    "KVCacheQuantConfig",
    "ModuleQuantizerConfig",
    "OpQuantizerConfig",
    "QATSchedule",
    "QuantizerConfig",
]
