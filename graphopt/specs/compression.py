"""What specs of every kind of compression have in common."""

from __future__ import annotations

from enum import Enum, StrEnum

from graphopt.specs.model import SpecModel

__all__ = ["CompressionSpec", "CompressionTargetTensor", "CompressionType"]


class CompressionSpec(SpecModel):
    """How one tensor is compressed.

    Examples:
        >>> issubclass(graphopt.palettization.PalettizationSpec, CompressionSpec)
        True
    """


class CompressionTargetTensor(Enum):
    """What kind of tensor a spec is for.

    Examples:
        >>> [kind.name for kind in CompressionTargetTensor]
        ['WEIGHT', 'ACTIVATION', 'LUT']
    """

    WEIGHT = "weight"
    ACTIVATION = "activation"
    LUT = "lut"


class CompressionType(StrEnum):
    """A kind of compression.

    Examples:
        >>> [str(kind) for kind in CompressionType]
        ['quantization', 'palettization', 'pruning']
    """

    QUANTIZATION = "quantization"
    PALETTIZATION = "palettization"
    PRUNING = "pruning"

    def to_coreml_code(self) -> int:
        """Its number in the `_COREML_/…/compression_type` buffers that coremltools reads."""
        codes = {
            CompressionType.PRUNING: 1,
            CompressionType.PALETTIZATION: 2,
            CompressionType.QUANTIZATION: 3,
        }
        return codes[self]
