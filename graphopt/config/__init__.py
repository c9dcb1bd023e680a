"""Which spec goes where in a model, in Python, YAML and JSON."""

from graphopt.config.base import (
    CompressionConfig,
    ModuleCompressionConfig,
    OpCompressionConfig,
)

__all__ = ["CompressionConfig", "ModuleCompressionConfig", "OpCompressionConfig"]
