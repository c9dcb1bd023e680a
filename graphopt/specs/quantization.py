"""QuantizationSpec: how one tensor is mapped to a narrow element type."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field, field_serializer, field_validator, model_validator

from graphopt.audited import attribute_of
from graphopt.errors import ConfigError
from graphopt.specs.compression import CompressionSpec
from graphopt.specs.dtypes import TorchDType, dtype_name, parse_dtype
from graphopt.specs.granularity import PerTensorGranularity, QuantizationGranularity

__all__ = [
    "QuantizationFormulation",
    "QuantizationScheme",
    "QuantizationSpec",
    "register_calculator",
]


class QuantizationScheme(StrEnum):
    """Where the representable range sits around zero.

    Examples:
        >>> graphopt.quantization.QuantizationSpec(qscheme=QuantizationScheme.ASYMMETRIC).qscheme.name
        'ASYMMETRIC'
    """

    SYMMETRIC = "symmetric"
    SYMMETRIC_WITH_CLIPPING = "symmetric_with_clipping"
    ASYMMETRIC = "asymmetric"


class QuantizationFormulation(StrEnum):
    """`scale · (q − zero_point)` (ZP) or `scale · (q − q_min) + minimum` (MINVAL).

    Examples:
        >>> [each.name for each in QuantizationFormulation]
        ['ZP', 'MINVAL']
    """

    ZP = "zp"
    MINVAL = "minval"


QParamCalculator = Literal[
    "default",
    "static",
    "moving_average",
    "global_minmax",
    "dynamic",
    "percentile",
    "mse",
    "lp",
    "entropy",
]
FakeQuantize = Literal["default", "lsq"]
RangeCalculator = Literal["minmax", "mse"]
WeightAlgorithm = Literal["auto", "nearest", "gptq"]

_QUANTIZED = {
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (2, 3, 4, 6, 8)),
    *("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn_x2"),
}


_registered: dict[str, type] = {}


def register_calculator(name: str, calculator: type) -> None:
    """Let specs name a class of range statistics.

    Raises:
        ConfigError: The name is one of the built-in ones, or another class has it.
    """
    if name in get_args(QParamCalculator) or _registered.get(name, calculator) is not calculator:
        raise ConfigError(f"{name!r} already names range statistics; choose another name")
    _registered[name] = calculator


class QuantizationSpec(CompressionSpec):
    """How one tensor is quantized; field names as in coreai-opt.

    Attributes:
        dtype: Element type of the stored values: (u)int2/3/4/6/8, fp8 (e4m3fn, e5m2), fp4 (e2m1).
        qscheme: Symmetric, symmetric with clipping, or asymmetric.
        qformulation: Integer zero point (ZP) or float minimum (MINVAL).
        granularity: How many elements share one scale.
        fake_quantize_cls: "default" (scales follow the observed ranges) or "lsq" (scales are
            learned in training; LSQ, arXiv 1902.08153).
        qparam_calculator_cls: Range statistics: "static" (the latest tensor's minimum and maximum;
            the default of weights), "moving_average" (the default of activations),
            "global_minmax", "percentile", "mse", "lp" (between squared and largest error),
            "entropy", or a subclass of `graphopt.observers.Observer`. "dynamic", for activations: the
            scale is computed from each tensor when the model runs, for blocks of values, too.
        range_calculator_cls: For weights: "minmax", "mse" for the range of least squared error, or a
            subclass of `RangeCalculatorBase`.
        float_range: Fixed lower and upper bound of the float range; None leaves a side open.
        scale_dtype: Type in which scales are stored; None is the tensor's own type.
        algorithm: How the elements of weights are found. "nearest" rounds each; "gptq" minimises the
            error of the layer's outputs on the inputs that it will get, rounded ones where they are,
            by error feedback (arXiv 2210.17323, 2504.02692), and needs data. "auto" is "gptq"
            where there are data and "nearest" where not.

    Examples:
        >>> from graphopt.quantization.spec import PerBlockGranularity
        >>> spec = QuantizationSpec(dtype="int4", granularity=PerBlockGranularity(block_size=32))
        >>> spec.granularity.block_size
        32
    """

    dtype: TorchDType = torch.int8
    qscheme: QuantizationScheme = QuantizationScheme.SYMMETRIC
    qformulation: QuantizationFormulation = QuantizationFormulation.ZP
    granularity: QuantizationGranularity = Field(default_factory=PerTensorGranularity)
    fake_quantize_cls: FakeQuantize = "default"
    qparam_calculator_cls: QParamCalculator | type = "default"
    range_calculator_cls: RangeCalculator | type = "minmax"
    float_range: Annotated[tuple[float | None, float | None], Field()] = (None, None)
    scale_dtype: TorchDType | None = None
    algorithm: WeightAlgorithm = "auto"

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        if dtype_name(dtype) not in _QUANTIZED:
            raise ValueError(f"cannot quantize to {dtype}; use one of {sorted(_QUANTIZED)}")
        return dtype

    @model_validator(mode="before")
    @classmethod
    def _microscaled_fp4(cls, data: Any) -> Any:
        """fp4 is defined with power-of-two scales only (OCP Microscaling Formats)."""
        if isinstance(data, dict) and data.get("scale_dtype") is None and "dtype" in data:
            try:
                name = dtype_name(parse_dtype(data["dtype"]))
            except ValueError:
                return data
            if name.startswith("float4"):
                return {**data, "scale_dtype": parse_dtype("e8m0")}
        return data

    @field_validator("qparam_calculator_cls", "range_calculator_cls", mode="before")
    @classmethod
    def _class_by_name(cls, value: Any) -> Any:
        if isinstance(value, type):
            return vars(value).get("stands_for") or value
        if isinstance(value, str) and value in _registered:
            return _registered[value]
        if not isinstance(value, str) or "." not in value:
            return value
        kind = attribute_of(value)
        if not isinstance(kind, type):
            raise ValueError(
                f"{value!r} is no class of a module that is imported; import it first, or read the"
                " config with allow_imports=True"
            )
        return kind

    @field_serializer("qparam_calculator_cls", "range_calculator_cls")
    def _class_name(self, value: str | type) -> str:
        return value if isinstance(value, str) else f"{value.__module__}.{value.__qualname__}"

    @model_validator(mode="after")
    def _float_types_are_symmetric(self) -> QuantizationSpec:
        if self.dtype.is_floating_point or "float" in dtype_name(self.dtype):
            if self.qscheme is QuantizationScheme.ASYMMETRIC:
                raise ValueError(f"{self.dtype} has no zero point; use a symmetric qscheme")
            if self.qformulation is QuantizationFormulation.MINVAL:
                raise ValueError(f"{self.dtype} has no minimum; use qformulation 'zp'")
        low, high = self.float_range
        if low is not None and high is not None and low >= high:
            raise ValueError(f"float_range must be increasing, got {self.float_range}")
        return self

    @model_validator(mode="after")
    def _found_at_run_time(self) -> QuantizationSpec:
        if not self.dynamic:
            return self
        if self.qscheme is QuantizationScheme.SYMMETRIC_WITH_CLIPPING:
            raise ValueError("'dynamic' scales cover every value; use 'symmetric' or 'asymmetric'")
        if self.float_range != (None, None):
            raise ValueError(
                "'dynamic' scales follow each tensor, not a float_range; leave one of both out"
            )
        if self.scale_dtype is not None or self.fake_quantize_cls != "default":
            raise ValueError(
                "'dynamic' scales are float32 and not learned; leave scale_dtype and"
                " fake_quantize_cls at their defaults"
            )
        return self

    @property
    def dynamic(self) -> bool:
        """Whether scales are computed when the model runs."""
        return self.calculator == "dynamic"

    @property
    def calculator(self) -> str:
        """Name of the range statistics; "" for a class of the user's."""
        wanted = self.qparam_calculator_cls
        return wanted if isinstance(wanted, str) else ""
