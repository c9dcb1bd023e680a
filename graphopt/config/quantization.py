"""Configs of linear quantization, with coreai-opt's fields."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from graphopt.config.base import (
    ANY,
    CompressionConfig,
    ModuleCompressionConfig,
    OpCompressionConfig,
)
from graphopt.config.default_specs import (
    default_activation_quantization_spec,
    default_slots,
    default_weight_quantization_spec,
)
from graphopt.errors import InvalidExecutionModeError
from graphopt.specs import (
    PerBlockGranularity,
    PerChannelGranularity,
    QuantizationScheme,
    QuantizationSpec,
)
from graphopt.specs.dtypes import parse_dtype
from graphopt.specs.model import SpecModel

__all__ = [
    "ExecutionMode",
    "KVCacheQuantConfig",
    "ModuleQuantizerConfig",
    "OpQuantizerConfig",
    "QATSchedule",
    "QuantizerConfig",
    "default_activation_quantization_spec",
    "default_weight_quantization_spec",
]


class ExecutionMode(StrEnum):
    """coreai-opt's two engines; graphopt always works on the graph.

    Examples:
        >>> graphopt.quantization.QuantizerConfig().execution_mode is ExecutionMode.GRAPH
        True
    """

    EAGER = "eager"
    GRAPH = "graph"


class QATSchedule(SpecModel):
    """Training steps at which observers and fake quantization switch on and off.

    Examples:
        >>> QATSchedule(enable_fake_quant=100, disable_observer=1000).disable_observer
        1000
    """

    enable_observer: Annotated[int, Field(ge=0)] = 0
    enable_fake_quant: Annotated[int, Field(ge=0)] = 0
    disable_observer: Annotated[int, Field(ge=0)] | None = None


def _refuse_dynamic_weights(config: OpCompressionConfig[QuantizationSpec]) -> None:
    for field in ("op_state_spec", "module_state_spec"):
        for name, spec in getattr(config, field, {}).items():
            if spec is not None and spec.dynamic:
                raise ValueError(
                    f"{field}[{name!r}]: weights do not change when the model runs; 'dynamic' scales"
                    " are for activations, use qparam_calculator_cls='static'"
                )


class OpQuantizerConfig(OpCompressionConfig[QuantizationSpec]):
    """Quantization of one op's inputs, outputs and state.

    Examples:
        >>> sorted(OpQuantizerConfig().op_state_spec)
        ['weight']
    """

    @model_validator(mode="after")
    def _known_weights(self) -> Self:
        _refuse_dynamic_weights(self)
        return self

    @classmethod
    def default_slots(cls) -> dict[str, dict[Any, Any]]:
        """int8 activations and per-channel int8 weights."""
        return default_slots()


class KVCacheQuantConfig(SpecModel):
    """Quantization of what an op writes into a key-value cache: int8, a scale per token and head.

    Attributes:
        op_quantizer_config: Its output spec says the element type; symmetric int8 is what caches can
            be kept in. Scales come from each row as it is written, whatever granularity it has.

    Examples:
        >>> from graphopt.quantization import OpQuantizerConfig, QuantizerConfig
        >>> int8 = KVCacheQuantConfig(op_quantizer_config=OpQuantizerConfig())
        >>> list(QuantizerConfig(kv_cache_quant_configs={"index_copy": int8}).kv_cache_quant_configs)
        ['index_copy']
    """

    op_quantizer_config: OpQuantizerConfig

    @model_validator(mode="after")
    def _held(self) -> Self:
        specs = (self.op_quantizer_config.op_output_spec or {}).values()
        for spec in specs:
            if spec is not None and (spec.dtype, spec.qscheme) != (torch.int8, "symmetric"):
                raise ValueError(
                    f"caches are kept as symmetric int8 with a scale per token, not as {spec.dtype}"
                    f" ({spec.qscheme}); set op_output_spec to QuantizationSpec(dtype='int8')"
                )
        return self


class ModuleQuantizerConfig(ModuleCompressionConfig[QuantizationSpec, OpQuantizerConfig]):
    """Quantization of everything inside a module.

    Attributes:
        qat_schedule: When observers and fake quantization switch in training.

    Examples:
        >>> weights = ModuleQuantizerConfig.presets.w4()
        >>> weights.op_input_spec, str(weights.op_state_spec["weight"].dtype)
        ({'*': None}, 'torch.int4')
    """

    presets: ClassVar[type[_ModulePresets]]

    qat_schedule: QATSchedule | None = None

    @model_validator(mode="after")
    def _known_weights(self) -> Self:
        _refuse_dynamic_weights(self)
        return self

    @classmethod
    def default_slots(cls) -> dict[str, dict[Any, Any]]:
        """int8 activations and per-channel int8 weights."""
        return default_slots()


class QuantizerConfig(CompressionConfig[ModuleQuantizerConfig]):
    """What a quantizer does to a model.

    Attributes:
        preserved_attributes: Without effect here: captured programs keep what they use.
        execution_mode: Without effect here: the engine is graph-based.
        kv_cache_quant_configs: Op that updates a cache ("index_copy", "index_put") → its quantization.
        migrate_scales: Whether ranges of channels may move from activations to weights, exactly in
            float (`graphopt.passes.MigrateScales`), where there are calibration data.

    Examples:
        >>> config = QuantizerConfig.presets.w8()
        >>> program = graphopt.compress(model, example, config)
        >>> [row.n_bits for row in program.report()]
        [8, 8]
    """

    root_key: ClassVar[str] = "quantization_config"
    spec_key: ClassVar[str] = "quantization_spec"
    no_effect: ClassVar[dict[str, str]] = {
        "preserved_attributes": "a captured program keeps everything it uses",
        "execution_mode": "the engine always works on the graph",
    }
    presets: ClassVar[type[_Presets]]

    preserved_attributes: list[str] | None = None
    execution_mode: ExecutionMode = ExecutionMode.GRAPH
    kv_cache_quant_configs: dict[str, KVCacheQuantConfig] | None = None
    migrate_scales: bool = True

    @classmethod
    def default_global_config(cls) -> ModuleQuantizerConfig:
        """int8 activations and per-channel int8 weights."""
        return ModuleQuantizerConfig()

    def set_execution_mode(self, mode: ExecutionMode | str) -> Self:
        """Set `execution_mode`, which has no effect here.

        Raises:
            InvalidExecutionModeError: There is no such mode.
        """
        try:
            self.execution_mode = ExecutionMode(mode)
        except ValueError:
            modes = [known.value for known in ExecutionMode]
            raise InvalidExecutionModeError(
                f"execution_mode must be one of {modes}, got {mode!r}"
            ) from None
        return self

    @property
    def has_activations(self) -> bool:
        """Whether any activation gets a spec."""
        return _has_activations(self.model_dump())


def _has_activations(config: dict[Any, Any]) -> bool:
    for key, value in config.items():
        if not isinstance(value, dict):
            continue
        slots = key in (
            f"{owner}_{side}_spec" for owner in ("op", "module") for side in ("input", "output")
        )
        if slots and any(spec is not None for spec in value.values()):
            return True
        if _has_activations(value):
            return True
    return False


def _weight_only(spec: QuantizationSpec) -> ModuleQuantizerConfig:
    return ModuleQuantizerConfig(
        op_input_spec=None, op_output_spec=None, op_state_spec={"weight": spec}
    )


def _everywhere(activation: QuantizationSpec, weight: QuantizationSpec) -> ModuleQuantizerConfig:
    return ModuleQuantizerConfig(
        op_input_spec={ANY: activation},
        op_output_spec={ANY: activation},
        op_state_spec={"weight": weight},
    )


def _dynamic(weight: QuantizationSpec) -> ModuleQuantizerConfig:
    """Weights everywhere; what linear layers read is rounded with a scale per token."""
    token = QuantizationSpec(
        qscheme=QuantizationScheme.ASYMMETRIC,
        qparam_calculator_cls="dynamic",
        granularity=PerBlockGranularity(axis=-1, block_size=-1),
    )
    linear = OpQuantizerConfig(
        op_input_spec={ANY: token}, op_output_spec=None, op_state_spec={"weight": weight}
    )
    alone = _weight_only(weight)
    return alone.model_copy(update={"op_type_config": {"linear": linear}})


def _affine() -> QuantizationSpec:
    return QuantizationSpec(qscheme=QuantizationScheme.ASYMMETRIC, qparam_calculator_cls="lp")


class _ModulePresets:
    """Ready-made configs for one module."""

    @staticmethod
    def w8(*, axis: int | None = None) -> ModuleQuantizerConfig:
        """int8 weights, one scale per channel."""
        return _weight_only(QuantizationSpec(granularity=PerChannelGranularity(axis=axis)))

    @staticmethod
    def w4(*, axis: int | None = None) -> ModuleQuantizerConfig:
        """int4 weights, one scale per channel."""
        granularity = PerChannelGranularity(axis=axis)
        return _weight_only(QuantizationSpec(dtype=parse_dtype("int4"), granularity=granularity))

    @staticmethod
    def w4_per_block(*, block_size: int = 32, axis: int | None = None) -> ModuleQuantizerConfig:
        """int4 weights, one scale per block of input channels, or along `axis`."""
        granularity = PerBlockGranularity(block_size=block_size, axis=axis)
        return _weight_only(QuantizationSpec(dtype=parse_dtype("int4"), granularity=granularity))

    @staticmethod
    def w8a8() -> ModuleQuantizerConfig:
        """int8 weights and activations, the default."""
        return ModuleQuantizerConfig()

    @staticmethod
    def w8a8_affine() -> ModuleQuantizerConfig:
        """int8 weights; affine int8 activations with ranges of least error."""
        return _everywhere(_affine(), default_weight_quantization_spec())

    @staticmethod
    def w4a8(*, block_size: int = 32) -> ModuleQuantizerConfig:
        """int4 weights, one scale per block of input channels; affine int8 activations."""
        granularity = PerBlockGranularity(block_size=block_size)
        weight = QuantizationSpec(
            dtype=parse_dtype("int4"), granularity=granularity, range_calculator_cls="mse"
        )
        return _everywhere(_affine(), weight)

    @staticmethod
    def w8a8_dynamic() -> ModuleQuantizerConfig:
        """int8 weights; what linear layers read in int8 with a scale per token, found at run time."""
        return _dynamic(default_weight_quantization_spec())

    @staticmethod
    def w4a8_dynamic(*, block_size: int = 32) -> ModuleQuantizerConfig:
        """As `w8a8_dynamic`, with int4 weights, one bfloat16 scale per block of input channels."""
        weight = QuantizationSpec(
            dtype=parse_dtype("int4"),
            granularity=PerBlockGranularity(block_size=block_size),
            scale_dtype=torch.bfloat16,
            range_calculator_cls="mse",
        )
        return _dynamic(weight)

    @staticmethod
    def fp8() -> ModuleQuantizerConfig:
        """float8 (e4m3) weights, one scale per channel."""
        granularity = PerChannelGranularity()
        return _weight_only(
            QuantizationSpec(dtype=parse_dtype("fp8_e4m3"), granularity=granularity)
        )

    @staticmethod
    def mxfp4() -> ModuleQuantizerConfig:
        """float4 (e2m1) weights with a power-of-two scale per 32 input channels."""
        granularity = PerBlockGranularity(block_size=32)
        return _weight_only(
            QuantizationSpec(dtype=parse_dtype("fp4_e2m1"), granularity=granularity)
        )


_Mode = ExecutionMode


class _Presets:
    """Ready-made configs for a whole model: those of modules, everywhere."""

    @staticmethod
    def w8(*, axis: int | None = None, execution_mode: _Mode = _Mode.GRAPH) -> QuantizerConfig:
        """int8 weights, one scale per channel."""
        return _whole(_ModulePresets.w8(axis=axis), execution_mode)

    @staticmethod
    def w4(*, axis: int | None = None, execution_mode: _Mode = _Mode.GRAPH) -> QuantizerConfig:
        """int4 weights, one scale per channel."""
        return _whole(_ModulePresets.w4(axis=axis), execution_mode)

    @staticmethod
    def w4_per_block(
        *, block_size: int = 32, axis: int | None = None, execution_mode: _Mode = _Mode.GRAPH
    ) -> QuantizerConfig:
        """int4 weights, one scale per block of input channels, or along `axis`."""
        return _whole(_ModulePresets.w4_per_block(block_size=block_size, axis=axis), execution_mode)

    @staticmethod
    def w8a8() -> QuantizerConfig:
        """int8 weights and activations, the default."""
        return _whole(_ModulePresets.w8a8())

    @staticmethod
    def w8a8_affine() -> QuantizerConfig:
        """int8 weights; affine int8 activations with ranges of least error."""
        return _whole(_ModulePresets.w8a8_affine())

    @staticmethod
    def w4a8(*, block_size: int = 32) -> QuantizerConfig:
        """int4 weights, one scale per block of input channels; affine int8 activations."""
        return _whole(_ModulePresets.w4a8(block_size=block_size))

    @staticmethod
    def w8a8_dynamic() -> QuantizerConfig:
        """int8 weights; what linear layers read in int8 with a scale per token, found at run time."""
        return _whole(_ModulePresets.w8a8_dynamic())

    @staticmethod
    def w4a8_dynamic(*, block_size: int = 32) -> QuantizerConfig:
        """As `w8a8_dynamic`, with int4 weights, one bfloat16 scale per block of input channels."""
        return _whole(_ModulePresets.w4a8_dynamic(block_size=block_size))

    @staticmethod
    def fp8() -> QuantizerConfig:
        """float8 (e4m3) weights, one scale per channel."""
        return _whole(_ModulePresets.fp8())

    @staticmethod
    def mxfp4() -> QuantizerConfig:
        """float4 (e2m1) weights with a power-of-two scale per 32 input channels."""
        return _whole(_ModulePresets.mxfp4())


def _whole(module: ModuleQuantizerConfig, mode: _Mode = _Mode.GRAPH) -> QuantizerConfig:
    return QuantizerConfig(global_config=module, execution_mode=mode)


ModuleQuantizerConfig.presets = _ModulePresets
QuantizerConfig.presets = _Presets
