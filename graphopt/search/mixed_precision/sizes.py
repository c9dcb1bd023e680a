"""What a spec costs in a saved artifact: `graphopt.schemes.sizes` with the types that people ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

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
        lowering: Options of the target.

    Examples:
        >>> SizeModel(backend="coreai").rules.code_bits(3)  # stored in 4
        4
    """

    backend: str | None = None
    float_dtype: torch.dtype = torch.float16
    lut_dtype: torch.dtype | None = None
    lowering: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        backend: ExportBackend | str | None,
        float_dtype: torch.dtype | str | None = None,
        lut_dtype: torch.dtype | str | None = None,
        lowering: Mapping[str, Any] | None = None,
        own: torch.dtype = torch.float32,
    ) -> SizeModel:
        """From what people write.

        Args:
            backend: The target, or None.
            float_dtype: Type of floats; None is what the target's artifact has, float16 without one.
            lut_dtype: Type of table entries where it differs.
            lowering: Options of the target.
            own: Float type of the program's weights.

        Raises:
            LoweringError: The target or an option is unknown.
        """
        lut = None if lut_dtype is None else parse_dtype(lut_dtype)
        if backend is None:
            return cls(None, parse_dtype(float_dtype or torch.float16), lut)
        target, options = load_backend(backend), dict(lowering or {})
        floats = parse_dtype(float_dtype or target.storage(options, own).float_dtype)
        return cls(str(target.target), floats, lut, options)

    def weight_bits(
        self,
        spec: SpecModel | None,
        shape: Sequence[int],
        output_axis: int,
        reader: fx.Node | None = None,
        *,
        rounded: bool = False,
    ) -> int:
        """Stored bits of one weight.

        Args:
            spec: What it becomes, None for uncompressed.
            shape: Its shape.
            output_axis: Its output-channel axis.
            reader: The op that reads it; None is a linear layer.
            rounded: Whether the op computes with rounded activations.

        Raises:
            CompressionError: The spec does not fit the shape.
        """
        if spec is None:
            return dense_bits(shape, self.float_dtype)
        rules = self.rules
        parts = scheme_of(spec).parts(spec, shape, output_axis, rules)
        if self.backend is None:
            return parts.bits(rules)
        target = load_backend(self.backend)
        return target.stored_bits(parts, rules, self.lowering, reader, rounded=rounded)

    @property
    def rules(self) -> StorageRules:
        """How the target stores codes, with these types."""
        rules = StorageRules()
        if self.backend is not None:
            rules = load_backend(self.backend).storage(self.lowering, self.float_dtype)
        return replace(rules, float_dtype=self.float_dtype, lut_dtype=self.lut_dtype)

    def to_dict(self) -> dict[str, str | None]:
        """Plain values."""
        return {
            "backend": self.backend,
            "float_dtype": dtype_name(self.float_dtype),
            "lut_dtype": None if self.lut_dtype is None else dtype_name(self.lut_dtype),
        }
