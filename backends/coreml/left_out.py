"""coremltools' passes that are not run."""

from __future__ import annotations

__all__ = ["LEFT_OUT"]

LEFT_OUT = frozenset(
    {
        # reorders quantized tables into forms that later passes cannot shape
        "common::canonicalize_quantized_lut_pattern",
        # takes a value that is repeated whole between slices of it for padding by reflection
        "common::use_reflection_padding",
    }
)
