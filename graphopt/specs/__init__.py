"""What one tensor becomes: frozen values without torch modules in them."""

from graphopt.audited import own_module
from graphopt.specs.granularity import (
    PalettizationGranularity,
    PerBlockGranularity,
    PerChannelGranularity,
    PerGroupedChannelGranularity,
    PerTensorGranularity,
    QuantizationGranularity,
)
from graphopt.specs.palettization import (
    DefaultTrainingSpec,
    DKMTrainingSpec,
    PalettizationSpec,
    STETrainingSpec,
    TrainingStrategySpec,
    default_weight_palettization_spec,
)
from graphopt.specs.pruning import PruningSpec
from graphopt.specs.quantization import (
    QuantizationFormulation,
    QuantizationScheme,
    QuantizationSpec,
)

__all__ = [
    "DKMTrainingSpec",
    "DefaultTrainingSpec",
    "PalettizationGranularity",
    "PalettizationSpec",
    "PerBlockGranularity",
    "PerChannelGranularity",
    "PerGroupedChannelGranularity",
    "PerTensorGranularity",
    "PruningSpec",
    "QuantizationFormulation",
    "QuantizationGranularity",
    "QuantizationScheme",
    "QuantizationSpec",
    "STETrainingSpec",
    "TrainingStrategySpec",
    "default_weight_palettization_spec",
]


def __getattr__(name: str) -> object:
    # the table of what has moved stands above
    value: object = own_module("graphopt.moved").moved_name(__name__, name)
    return value
