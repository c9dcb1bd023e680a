"""What a spec costs in a saved artifact: `graphopt.schemes.sizes` with the types that people ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from graphopt.backends import ExportBackend, load_backend
from graphopt.schemes.registry import scheme_of
from graphopt.schemes.sizes import dense_bits
from graphopt.specs.dtypes import dtype_name, parse_dtype
from graphopt.specs.model import SpecModel
from graphopt.specs.storage import StorageRules

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
        spec: SpecModel | None,
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
            return dense_bits(shape, self.float_dtype)
        return scheme_of(spec).bits(spec, shape, output_axis, self.rules)

    @property
    def rules(self) -> StorageRules:
        """How the target stores codes, with these types."""
        rules = StorageRules()
        if self.backend is not None:
            rules = load_backend(self.backend).capabilities.storage
        return replace(rules, float_dtype=self.float_dtype, lut_dtype=self.lut_dtype)

    def to_dict(self) -> dict[str, str | None]:
        """Plain values."""
        return {
            "backend": self.backend,
            "float_dtype": dtype_name(self.float_dtype),
            "lut_dtype": None if self.lut_dtype is None else dtype_name(self.lut_dtype),
        }
