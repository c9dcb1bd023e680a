"""What a spec costs: the bits that its stored form takes, tables, scales and padding included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphopt.backends import ExportBackend, load_backend
from graphopt.numerics.affine import grid_of, has_whole_offsets
from graphopt.schemes.layout import plan_layout
from graphopt.schemes.quantize import plan_blocks
from graphopt.specs import PalettizationSpec, QuantizationScheme, QuantizationSpec
from graphopt.specs.dtypes import bits_of, dtype_name, parse_dtype

__all__ = ["SizeModel"]


@dataclass(frozen=True)
class SizeModel:
    """Sizes of weights in a saved artifact.

    Attributes:
        backend: Name of the target, whose padding counts; None stores every width as it is.
        float_dtype: Type of tables, scales and uncompressed weights.
        lut_dtype: Type of table entries where it differs. Published size tables that count 32-bit
            entries beside packed indices are those of `torch.float32`.
    """

    backend: str | None = None
    float_dtype: torch.dtype = torch.float16
    lut_dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls,
        backend: ExportBackend | str | None,
        float_dtype: torch.dtype | str,
        lut_dtype: torch.dtype | str | None,
    ) -> SizeModel:
        """From what people write.

        Raises:
            LoweringError: The target is unknown.
        """
        name = None if backend is None else str(getattr(backend, "value", backend))
        if name is not None:
            load_backend(name)
        lut = None if lut_dtype is None else parse_dtype(lut_dtype)
        return cls(name, parse_dtype(float_dtype), lut)

    def weight_bits(
        self,
        spec: PalettizationSpec | QuantizationSpec | None,
        shape: Sequence[int],
        output_axis: int,
    ) -> int:
        """Stored bits of one weight.

        Args:
            spec: What it becomes, None for uncompressed.
            shape: Its shape.
            output_axis: Its output-channel axis.

        Raises:
            CompressionError: The spec does not fit the shape.
        """
        if spec is None:
            return math.prod(shape) * bits_of(self.float_dtype)
        if isinstance(spec, PalettizationSpec):
            return self._palette_bits(spec, shape, output_axis)
        return self._quantized_bits(spec, shape, output_axis)

    def to_dict(self) -> dict[str, str | None]:
        """Plain values."""
        return {
            "backend": self.backend,
            "float_dtype": dtype_name(self.float_dtype),
            "lut_dtype": None if self.lut_dtype is None else dtype_name(self.lut_dtype),
        }

    def _width(self, bits: int) -> int | None:
        """Bits that the target stores for codes of `bits`, None where it has no tables."""
        if self.backend is None:
            return bits
        return load_backend(self.backend).capabilities.stored_bits(bits)

    def _palette_bits(self, spec: PalettizationSpec, shape: Sequence[int], axis: int) -> int:
        layout = plan_layout(shape, axis, spec)
        floats = bits_of(self.float_dtype)
        width = self._width(spec.n_bits)
        if width is None:
            # lookups are expanded when lowered
            return math.prod(shape) * floats
        entries = bits_of(self.lut_dtype or self.float_dtype)
        tables = layout.n_groups
        total = _whole_bytes(math.prod(layout.index_shape()) * width)
        if spec.lut_qspec is not None:
            entries = bits_of(spec.lut_qspec.dtype)
            total += tables * (floats + (8 if _has_offset(spec.lut_qspec) else 0))
        total += _whole_bytes(tables * 2**width * spec.cluster_dim * entries)
        if spec.enable_per_channel_scale:
            total += layout.shape[axis] * floats
        count = round(spec.outlier_fraction * math.prod(shape))
        if count:
            total += count * floats + _whole_bytes(math.prod(shape))
        return total

    def _quantized_bits(self, spec: QuantizationSpec, shape: Sequence[int], axis: int) -> int:
        blocks, _ = plan_blocks(shape, axis, spec.granularity)
        scales = math.prod(blocks.counts)
        grid = grid_of(spec)
        narrow = () if self.backend is None else load_backend(self.backend).capabilities.table_types
        width, total = grid.bits, 0
        if grid.storage in narrow:
            # held as codes of a table with every value of the type
            width = self._width(grid.bits) or grid.bits
            total += 2**width * 8
        total += _whole_bytes(math.prod(shape) * width)
        total += scales * bits_of(spec.scale_dtype or self.float_dtype)
        if _has_offset(spec):
            total += scales * (8 if has_whole_offsets(spec) else 32)
        return total


def _has_offset(spec: QuantizationSpec) -> bool:
    symmetric = spec.qscheme is not QuantizationScheme.ASYMMETRIC
    return not (symmetric and has_whole_offsets(spec) and grid_of(spec).middle == 0)


def _whole_bytes(bits: int) -> int:
    return 8 * math.ceil(bits / 8)
