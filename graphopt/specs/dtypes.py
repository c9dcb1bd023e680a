"""Element types of compressed tensors, by the names that configs use."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BeforeValidator, PlainSerializer

__all__ = ["TorchDType", "bits_of", "dtype_name", "parse_dtype"]

_ALIASES: dict[str, str] = {
    "fp8_e4m3": "float8_e4m3fn",
    "float8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "fp4_e2m1": "float4_e2m1fn_x2",
    "float4_e2m1": "float4_e2m1fn_x2",
    "e8m0": "float8_e8m0fnu",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
}
_BITS: dict[str, int] = {
    **{f"{sign}int{bits}": bits for sign in ("", "u") for bits in range(1, 9)},
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
    "float8_e8m0fnu": 8,
    "float4_e2m1fn_x2": 4,
    "float16": 16,
    "bfloat16": 16,
    "float32": 32,
    "float64": 64,
}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.int8` → "int8"."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(value: object) -> torch.dtype:
    """Read a dtype from a `torch.dtype` or a name ("int4", "torch.int4", "fp8_e4m3").

    Raises:
        ValueError: The name is no element type that a spec can hold.
    """
    if isinstance(value, torch.dtype):
        return value
    name = str(value).removeprefix("torch.")
    name = _ALIASES.get(name, name)
    dtype = getattr(torch, name, None)
    if name not in _BITS or not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {value!r}; use one of {sorted(_BITS)}")
    return dtype


def bits_of(dtype: torch.dtype) -> int:
    """Bits of one stored element.

    Raises:
        ValueError: The dtype has no place in compressed storage.
    """
    name = dtype_name(dtype)
    if name not in _BITS:
        raise ValueError(f"{dtype} is not an element type of compressed storage")
    return _BITS[name]


TorchDType = Annotated[
    torch.dtype, BeforeValidator(parse_dtype), PlainSerializer(dtype_name, return_type=str)
]
