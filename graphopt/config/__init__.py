"""Which spec goes where in a model, in Python, YAML and JSON."""

from graphopt.audited import own_module
from graphopt.config.base import (
    CompressionConfig,
    ModuleCompressionConfig,
    OpCompressionConfig,
)
from graphopt.config.weight_only import (
    WeightOnlyModuleValidationMixin,
    WeightOnlyOpValidationMixin,
)
from graphopt.specs.compression import (
    CompressionSpec,
    CompressionTargetTensor,
    CompressionType,
)

__all__ = [
    "CompressionConfig",
    "CompressionSpec",
    "CompressionTargetTensor",
    "CompressionType",
    "ModuleCompressionConfig",
    "OpCompressionConfig",
    "WeightOnlyModuleValidationMixin",
    "WeightOnlyOpValidationMixin",
]

own_module("graphopt.moved").provide(__name__)
