"""Configs of k-means palettization."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from graphopt.config.base import (
    CompressionConfig,
    ModuleCompressionConfig,
    OpCompressionConfig,
)
from graphopt.config.weight_only import (
    WeightOnlyModuleValidationMixin,
    WeightOnlyOpValidationMixin,
)
from graphopt.specs import (
    PalettizationSpec,
    PerGroupedChannelGranularity,
    PerTensorGranularity,
    default_weight_palettization_spec,
)
from graphopt.specs.model import SpecModel
from graphopt.specs.palettization import Bits, VectorKMeansConfig

__all__ = [
    "DKMPalettizerConfig",
    "KMeansPalettizerConfig",
    "ModuleDKMPalettizerConfig",
    "ModuleKMeansPalettizerConfig",
    "OpDKMPalettizerConfig",
    "OpKMeansPalettizerConfig",
    "PATSchedule",
]

_STATES = ("weight", "in_proj_weight")


def _default_slots() -> dict[str, dict[Any, Any]]:
    return {"op_state_spec": {name: default_weight_palettization_spec() for name in _STATES}}


class PATSchedule(SpecModel):
    """When palettization-aware training palettizes, counted in calls of `step`.

    Attributes:
        enable_fake_palettize: First step with palettes; before it weights train as they are.
        freeze_codes: Step from which codes stay and only tables, biases and norms train, or None.

    Examples:
        >>> PATSchedule(enable_fake_palettize=100, freeze_codes=900).freeze_codes
        900
    """

    enable_fake_palettize: Annotated[int, Field(ge=0)] = 0
    freeze_codes: Annotated[int, Field(ge=0)] | None = None


class OpKMeansPalettizerConfig(WeightOnlyOpValidationMixin, OpCompressionConfig[PalettizationSpec]):
    """Palettization of one op's state; 4 bits per tensor for its weight by default.

    Examples:
        >>> spec = graphopt.palettization.PalettizationSpec(n_bits=8)
        >>> OpKMeansPalettizerConfig(op_state_spec={"weight": spec}).op_state_spec["weight"].n_bits
        8
    """

    @classmethod
    def default_slots(cls) -> dict[str, dict[Any, Any]]:
        """4 bits per tensor for "weight" and "in_proj_weight"."""
        return _default_slots()


class ModuleKMeansPalettizerConfig(
    WeightOnlyModuleValidationMixin,
    ModuleCompressionConfig[PalettizationSpec, OpKMeansPalettizerConfig],
):
    """Palettization of everything inside a module; 4 bits per tensor by default.

    Attributes:
        enable_fast_kmeans_mode: Without effect here: tables are optimal on the weights as they are.
        rounding_precision: Without effect here: no weight is rounded before clustering.
        pat_schedule: When training-time palettization starts.
        vector_kmeans_config: How tables of vectors are clustered; there must be a spec with
            `cluster_dim` above 1.

    Examples:
        >>> ModuleKMeansPalettizerConfig.presets.w6(group_size=8).op_state_spec["weight"].n_bits
        6
    """

    no_effect: ClassVar[dict[str, str]] = {
        "enable_fast_kmeans_mode": "tables are optimal without rounding the weights first",
        "rounding_precision": "no weight is rounded before clustering",
    }
    presets: ClassVar[type[_ModulePresets]]

    enable_fast_kmeans_mode: bool = True
    rounding_precision: Annotated[int, Field(gt=0)] = 4
    pat_schedule: PATSchedule | None = None
    vector_kmeans_config: VectorKMeansConfig | None = None

    @model_validator(mode="after")
    def _there_are_vectors(self) -> Self:
        if self.vector_kmeans_config is None:
            return self
        ops = [*self.op_type_config.values(), *self.op_name_config.values()]
        slots = [self.op_state_spec, self.module_state_spec]
        slots += [op.op_state_spec for op in ops if op is not None]
        specs = [spec for slot in slots for spec in slot.values() if spec is not None]
        if not any(spec.cluster_dim > 1 for spec in specs):
            raise ValueError("vector_kmeans_config is for specs with cluster_dim above 1")
        return self

    @classmethod
    def default_slots(cls) -> dict[str, dict[Any, Any]]:
        """4 bits per tensor for "weight" and "in_proj_weight"."""
        return _default_slots()


class KMeansPalettizerConfig(CompressionConfig[ModuleKMeansPalettizerConfig]):
    """What `KMeansPalettizer` does to a model; 4 bits per tensor everywhere by default.

    Attributes:
        weight_threshold: Tensors of at most this many elements are left alone. 0 compresses all;
            coremltools uses 2048.

    Examples:
        >>> config = KMeansPalettizerConfig.presets.w4(group_size=16)
        >>> program = graphopt.compress(model, example, config)
        >>> [row.n_bits for row in program.report()]
        [4, 4]
    """

    root_key: ClassVar[str] = "kmeans_palettization_config"
    spec_key: ClassVar[str] = "palettization_spec"
    presets: ClassVar[type[_Presets]]

    weight_threshold: Annotated[int, Field(ge=0)] = 0

    @classmethod
    def default_global_config(cls) -> ModuleKMeansPalettizerConfig:
        """4 bits per tensor."""
        return ModuleKMeansPalettizerConfig()

    @property
    def looks_for_zeros(self) -> bool:
        """Whether any spec has a `sparsity_detection_threshold`."""
        return _looks_for_zeros(self.model_dump())


def _looks_for_zeros(config: dict[Any, Any]) -> bool:
    return config.get("sparsity_detection_threshold") is not None or any(
        _looks_for_zeros(value) for value in config.values() if isinstance(value, dict)
    )


def _module_config(n_bits: Bits, axis: int | None, group_size: int | None) -> Any:
    granularity = (
        PerTensorGranularity()
        if group_size is None
        else PerGroupedChannelGranularity(axis=axis, group_size=group_size)
    )
    spec = PalettizationSpec(n_bits=n_bits, granularity=granularity)
    return ModuleKMeansPalettizerConfig(op_state_spec=dict.fromkeys(_STATES, spec))


# of the codes' bits: tables of 256 vectors pay from some ten thousand weights on
_TABLE_SHARE = 0.125


def _vector_config(n_bits: Bits, length: int, grouped: float = 0.001) -> Any:
    spec = PalettizationSpec(
        n_bits=n_bits,
        cluster_dim=length,
        max_table_share=_TABLE_SHARE,
        grouped_table_share=grouped,
    )
    return ModuleKMeansPalettizerConfig(op_state_spec=dict.fromkeys(_STATES, spec))


class _ModulePresets:
    """Ready-made module configs."""

    @staticmethod
    def w4(*, axis: int | None = 0, group_size: int = 16) -> ModuleKMeansPalettizerConfig:
        """4-bit weights, one table per group of channels."""
        config: ModuleKMeansPalettizerConfig = _module_config(4, axis, group_size)
        return config

    @staticmethod
    def w6(*, axis: int | None = 0, group_size: int = 16) -> ModuleKMeansPalettizerConfig:
        """6-bit weights, one table per group of channels."""
        config: ModuleKMeansPalettizerConfig = _module_config(6, axis, group_size)
        return config

    @staticmethod
    def w8() -> ModuleKMeansPalettizerConfig:
        """8-bit weights, one table per tensor."""
        config: ModuleKMeansPalettizerConfig = _module_config(8, None, None)
        return config

    @staticmethod
    def w4_vectors() -> ModuleKMeansPalettizerConfig:
        """4-bit weights, 8 bits for two where the tensor carries the table."""
        config: ModuleKMeansPalettizerConfig = _vector_config(8, 2)
        return config

    @staticmethod
    def w3_vectors() -> ModuleKMeansPalettizerConfig:
        """3-bit weights, 6 bits for two where the tensor carries the table."""
        config: ModuleKMeansPalettizerConfig = _vector_config(6, 2, 0.05)
        return config

    @staticmethod
    def w2_vectors() -> ModuleKMeansPalettizerConfig:
        """2-bit weights, 8 bits for four where the tensor carries the table."""
        config: ModuleKMeansPalettizerConfig = _vector_config(8, 4)
        return config


class _Presets:
    """Ready-made configs for a whole model."""

    @staticmethod
    def w4(*, axis: int | None = 0, group_size: int = 16) -> KMeansPalettizerConfig:
        """4-bit weights, one table per group of channels."""
        return KMeansPalettizerConfig(
            global_config=_ModulePresets.w4(axis=axis, group_size=group_size)
        )

    @staticmethod
    def w6(*, axis: int | None = 0, group_size: int = 16) -> KMeansPalettizerConfig:
        """6-bit weights, one table per group of channels."""
        return KMeansPalettizerConfig(
            global_config=_ModulePresets.w6(axis=axis, group_size=group_size)
        )

    @staticmethod
    def w8() -> KMeansPalettizerConfig:
        """8-bit weights, one table per tensor."""
        return KMeansPalettizerConfig(global_config=_ModulePresets.w8())

    @staticmethod
    def w4_vectors() -> KMeansPalettizerConfig:
        """4-bit weights, 8 bits for two where the tensor carries the table."""
        return KMeansPalettizerConfig(global_config=_ModulePresets.w4_vectors())

    @staticmethod
    def w3_vectors() -> KMeansPalettizerConfig:
        """3-bit weights, 6 bits for two where the tensor carries the table."""
        return KMeansPalettizerConfig(global_config=_ModulePresets.w3_vectors())

    @staticmethod
    def w2_vectors() -> KMeansPalettizerConfig:
        """2-bit weights, 8 bits for four where the tensor carries the table."""
        return KMeansPalettizerConfig(global_config=_ModulePresets.w2_vectors())


class OpDKMPalettizerConfig(OpKMeansPalettizerConfig):
    """Palettization of one op's state by differentiable k-means.

    Examples:
        >>> OpDKMPalettizerConfig().op_state_spec["weight"].n_bits
        4
    """


class ModuleDKMPalettizerConfig(ModuleKMeansPalettizerConfig):
    """Palettization of everything inside a module by differentiable k-means.

    Examples:
        >>> from graphopt.palettization.config import PATSchedule
        >>> ModuleDKMPalettizerConfig(pat_schedule=PATSchedule(freeze_codes=50)).pat_schedule.freeze_codes
        50
    """


class DKMPalettizerConfig(KMeansPalettizerConfig):
    """What `DKMPalettizer` does to a model; 4 bits per tensor everywhere by default.

    The fields are those of `KMeansPalettizerConfig`; temperature and iterations are in a spec's
    `training_strategy_spec=DKMTrainingSpec(...)`, the schedule in `pat_schedule`.

    Examples:
        >>> DKMPalettizerConfig().global_config.op_state_spec["weight"].n_bits
        4
    """

    root_key: ClassVar[str] = "dkm_palettization_config"


ModuleKMeansPalettizerConfig.presets = _ModulePresets
KMeansPalettizerConfig.presets = _Presets
