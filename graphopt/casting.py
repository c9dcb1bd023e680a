"""16-bit casting of exported programs: fp32 → fp16 and int32/int64 → int16, with guards."""

from graphopt import moved
from graphopt.backends.casting import (
    cast_fp32_to_fp16,
    cast_int32_to_int16,
    cast_to_16_bit_precision,
)

__all__ = ["cast_fp32_to_fp16", "cast_int32_to_int16", "cast_to_16_bit_precision"]

moved.provide(__name__)
