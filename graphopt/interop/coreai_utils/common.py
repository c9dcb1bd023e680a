"""Options of the functions on Core AI programs, with coreai-opt's names and values."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

import torch

from graphopt.errors import ConfigError
from graphopt.specs import QuantizationScheme
from graphopt.specs.dtypes import parse_dtype

__all__ = ["CompressionGranularity", "DType", "QScheme", "check_whole", "option_of", "torch_dtype"]


class DType(StrEnum):
    """Element types of stored weights, tables and scales.

    Examples:
        >>> DType("int4")
        <DType.INT4: 'int4'>
    """

    INT2 = "int2"
    UINT2 = "uint2"
    INT4 = "int4"
    UINT4 = "uint4"
    INT8 = "int8"
    UINT8 = "uint8"
    FP4_E2M1FN = "fp4_e2m1fn"
    FP8_E4M3FN = "fp8_e4m3fn"
    FP8_E5M2 = "fp8_e5m2"
    FP8_E8M0FNU = "fp8_e8m0fnu"


class CompressionGranularity(StrEnum):
    """How many elements share a table or a scale.

    Examples:
        >>> CompressionGranularity("per_channel")
        <CompressionGranularity.PER_CHANNEL: 'per_channel'>
    """

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_BLOCK = "per_block"
    PER_GROUPED_CHANNEL = "per_grouped_channel"


class QScheme(StrEnum):
    """Where the representable range sits around zero.

    Examples:
        >>> QScheme("symmetric")
        <QScheme.SYMMETRIC: 'symmetric'>
    """

    SYMMETRIC = "symmetric"
    ASYMMETRIC = "asymmetric"

    @property
    def scheme(self) -> QuantizationScheme:
        """The same as a field of our specs."""
        return QuantizationScheme(self.value)


OptionT = TypeVar("OptionT", bound=StrEnum)


def option_of(kind: type[OptionT], value: str, allowed: tuple[OptionT, ...], name: str) -> OptionT:
    """One of the allowed values of an option, given as itself or as its text.

    Raises:
        ConfigError: It is none of them.
    """
    try:
        option = kind(value)
    except ValueError:
        option = None
    if option is None or option not in allowed:
        known = [choice.value for choice in allowed]
        raise ConfigError(f"{name} must be one of {known}, got {value!r}")
    return option


def check_whole(value: object, name: str, least: int) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        ConfigError: With the option's name.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")


def torch_dtype(dtype: DType) -> torch.dtype:
    """The element type as torch names it."""
    names = {
        DType.FP4_E2M1FN: "float4_e2m1fn_x2",
        DType.FP8_E4M3FN: "float8_e4m3fn",
        DType.FP8_E5M2: "float8_e5m2",
        DType.FP8_E8M0FNU: "float8_e8m0fnu",
    }
    return parse_dtype(names.get(dtype, dtype.value))
