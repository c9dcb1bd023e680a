"""PalettizationSpec: how one weight becomes indices into a table of centroids."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import override

from graphopt.specs.compression import CompressionSpec
from graphopt.specs.dtypes import dtype_name
from graphopt.specs.granularity import PalettizationGranularity, PerTensorGranularity
from graphopt.specs.model import SpecModel
from graphopt.specs.quantization import QuantizationFormulation, QuantizationSpec

__all__ = [
    "Bits",
    "DKMTrainingSpec",
    "DefaultTrainingSpec",
    "PalettizationSpec",
    "STETrainingSpec",
    "TrainingStrategySpec",
    "VectorKMeansConfig",
    "default_weight_palettization_spec",
]

Bits = Literal[1, 2, 3, 4, 6, 8]

_LUT_DTYPES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)


class TrainingStrategySpec(SpecModel):
    """How a palettized weight behaves in training.

    Examples:
        >>> from graphopt.specs import DKMTrainingSpec
        >>> isinstance(DKMTrainingSpec(), TrainingStrategySpec)
        True
    """

    def differentiable(self, default: DKMTrainingSpec | None) -> DKMTrainingSpec | None:
        """The differentiable k-means that is asked for; None is the straight-through estimator.

        Args:
            default: The compressor's own way.
        """
        del default
        return None


class DefaultTrainingSpec(TrainingStrategySpec):
    """The compressor's own way: straight-through for k-means, differentiable k-means for DKM.

    Examples:
        >>> graphopt.palettization.PalettizationSpec().training_strategy_spec
        DefaultTrainingSpec()
    """

    type: Literal["default"] = Field(default="default", repr=False)

    @override
    def differentiable(self, default: DKMTrainingSpec | None) -> DKMTrainingSpec | None:
        return default


class STETrainingSpec(TrainingStrategySpec):
    """Nearest table entries, which follow the weights; gradients pass straight through.

    Examples:
        >>> training = STETrainingSpec()
        >>> spec = graphopt.specs.PalettizationSpec(n_bits=2, training_strategy_spec=training)
        >>> spec.training_strategy_spec.type
        'ste'
    """

    type: Literal["ste"] = Field(default="ste", repr=False)


class DKMTrainingSpec(TrainingStrategySpec):
    """Differentiable k-means: soft mixtures of table entries (arXiv 2108.12659).

    Attributes:
        temperature: τ of the attention relative to the mean squared error of the first clustering;
            small values approach the nearest entry. A value relative to the weights' own scale
            serves layers of any magnitude.
        iterations: Soft k-means steps of each training step.

    Examples:
        >>> training = DKMTrainingSpec(iterations=4)
        >>> spec = graphopt.specs.PalettizationSpec(n_bits=2, training_strategy_spec=training)
        >>> spec.training_strategy_spec
        DKMTrainingSpec(temperature=0.5, iterations=4)
    """

    type: Literal["dkm"] = Field(default="dkm", repr=False)
    temperature: Annotated[float, Field(gt=0)] = 0.5
    iterations: Annotated[int, Field(ge=1)] = 2

    @override
    def differentiable(self, default: DKMTrainingSpec | None) -> DKMTrainingSpec:
        return self


TrainingStrategy = Annotated[
    DefaultTrainingSpec | STETrainingSpec | DKMTrainingSpec, Field(discriminator="type")
]


class VectorKMeansConfig(SpecModel):
    """How tables of vectors (`cluster_dim` above 1) are clustered; None is our own default.

    Attributes:
        n_local_trials: Candidates of each seeded entry; the best is kept (k-means++).
        n_init: Clusterings from other seeds; the one of least error is kept. One by default: the
            annealed steps depend little on where they start.
        max_iter: Largest number of steps.
        tol: A clustering ends where a step lowers its error by a smaller fraction.

    Examples:
        >>> VectorKMeansConfig(n_init=2, max_iter=20).max_iter
        20
    """

    n_local_trials: Annotated[int, Field(gt=0)] | None = None
    n_init: Annotated[int, Field(gt=0)] | None = None
    max_iter: Annotated[int, Field(gt=0)] | None = None
    tol: Annotated[float, Field(ge=0)] | None = None


class PalettizationSpec(CompressionSpec):
    """Store a weight as indices of `n_bits` into tables of `2**n_bits` entries.

    Attributes:
        n_bits: Bits per index: 1, 2, 3, 4, 6 or 8.
        lut_qspec: How table entries themselves are quantized (int8, uint8, fp8; one scale per
            table, ZP formulation); None keeps them in the weight's type.
        granularity: One table per tensor, or per group of channels.
        cluster_dim: Length of a table entry; above 1, that many consecutive weights along
            `cluster_axis` share one index.
        cluster_axis: Axis along which the entries of tables of vectors lie; None is the
            output-channel axis.
        max_table_share: Bits that one table of the tensor may add to its codes, relative to theirs.
            Where it is given, each tensor gets the longest entries that it carries, at the same
            `n_bits / cluster_dim` per weight: along the output channels, or another axis that their
            length divides; and as many tables as `grouped_table_share` allows. None keeps what the
            other fields say.
        grouped_table_share: Bits that several tables of a tensor together may add to its codes,
            relative to theirs, where there is a `max_table_share` (a fiftieth, at least, where
            entries are scalars).
        enable_per_channel_scale: Divide each output channel by its largest magnitude first and
            store the scales beside the indices.
        training_strategy_spec: Behaviour in training.
        algorithm: How tables and codes are found. "kmeans" minimises the error of the weights;
            "skm" weighs it by the loss's squared gradients (SqueezeLLM, arXiv 2306.07629); "gptq"
            minimises the error of the layer's outputs, by error feedback with tables (arXiv
            2210.17323). The last two need `calibration_mode()`. "auto" is the best that the data
            allow: without a calibration "kmeans"; with one "gptq", or "skm" for weights that several
            ops or recurrent ones read, and beside outliers.
        outlier_fraction: Share of the weights that stay as they are, in a sparse tensor beside the
            tables: those farthest from their group's mean, by importance where there is any (the
            dense-and-sparse form of SqueezeLLM, section 4.2). The targets' sparse ops store a mask
            of one bit per weight besides the values.
        sparsity_detection_threshold: Share of exact zeros, in [0, 1], from which a weight is taken
            for pruned: its zeros stay in a mask, and one scalar table serves the other values. None
            makes no difference between zeros and others.
        vector_kmeans: How tables of vectors are clustered; a module's `vector_kmeans_config` fills
            it in.

    Examples:
        >>> from graphopt.palettization.spec import PerGroupedChannelGranularity
        >>> groups = PerGroupedChannelGranularity(axis=0, group_size=16)
        >>> spec = PalettizationSpec(n_bits=2, granularity=groups, algorithm="gptq")
        >>> spec.n_bits, spec.granularity.group_size
        (2, 16)
    """

    n_bits: Bits = 4
    lut_qspec: QuantizationSpec | None = None
    granularity: PalettizationGranularity = Field(default_factory=PerTensorGranularity)
    cluster_dim: Annotated[int, Field(ge=1)] = 1
    cluster_axis: Annotated[int, Field(ge=0)] | None = None
    max_table_share: Annotated[float, Field(gt=0, le=1)] | None = None
    grouped_table_share: Annotated[float, Field(ge=0, le=1)] = 0.001
    enable_per_channel_scale: bool = False
    training_strategy_spec: TrainingStrategy = Field(default_factory=DefaultTrainingSpec)
    algorithm: Literal["auto", "kmeans", "skm", "gptq"] = "auto"
    outlier_fraction: Annotated[float, Field(ge=0, le=0.1)] = 0.0
    sparsity_detection_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    vector_kmeans: VectorKMeansConfig | None = None

    @model_validator(mode="after")
    def _outliers_have_a_place(self) -> PalettizationSpec:
        if not self.outlier_fraction:
            return self
        if self.algorithm == "gptq":
            raise ValueError("outlier_fraction needs algorithm 'kmeans' or 'skm', got 'gptq'")
        if self.cluster_dim > 1:
            raise ValueError(f"outlier_fraction needs cluster_dim=1, got {self.cluster_dim}")
        return self

    @model_validator(mode="after")
    def _lut_qspec_fits_a_table(self) -> PalettizationSpec:
        qspec = self.lut_qspec
        if qspec is None:
            return self
        if qspec.dtype not in _LUT_DTYPES:
            allowed = [dtype_name(dtype) for dtype in _LUT_DTYPES]
            raise ValueError(
                f"lut_qspec.dtype must be one of {allowed}, got {dtype_name(qspec.dtype)}"
            )
        if not isinstance(qspec.granularity, PerTensorGranularity):
            raise ValueError("lut_qspec.granularity must be PerTensorGranularity()")
        if qspec.qformulation is QuantizationFormulation.MINVAL:
            raise ValueError("lut_qspec.qformulation must be 'zp'")
        return self

    @property
    def n_entries(self) -> int:
        """Entries of one table."""
        return int(2**self.n_bits)


def default_weight_palettization_spec() -> PalettizationSpec:
    """4 bits, one table per tensor.

    Examples:
        >>> default_weight_palettization_spec().n_bits
        4
    """
    return PalettizationSpec()
