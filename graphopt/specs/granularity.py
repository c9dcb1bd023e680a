"""How many elements share one table or one scale: a sum type per kind of compression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from graphopt.errors import ConfigError
from graphopt.specs.model import SpecModel

__all__ = [
    "PalettizationGranularity",
    "PerBlockGranularity",
    "PerChannelGranularity",
    "PerGroupedChannelGranularity",
    "PerTensorGranularity",
    "QuantizationGranularity",
    "resolve_block_sizes",
    "value_block_sizes",
]


class PerTensorGranularity(SpecModel):
    """One table (or one scale) for the whole tensor.

    Examples:
        >>> graphopt.palettization.PalettizationSpec(granularity=PerTensorGranularity()).granularity
        PerTensorGranularity(axis=None)
    """

    type: Literal["per_tensor"] = Field(default="per_tensor", repr=False)
    axis: None = None


class PerGroupedChannelGranularity(SpecModel):
    """One table per `group_size` consecutive channels.

    Attributes:
        axis: Axis of the stored tensor; None is the op's output-channel axis (0 for convolutions
            and linear, 1 for transposed convolutions, the last for a right-hand matmul operand).
        group_size: Channels per table, at least 1. A size that does not divide the channel count
            is replaced by the nearest divisor (`graphopt.schemes.palettize.resolve_group_size`)
            with a warning that names the layer.

    Examples:
        >>> PerGroupedChannelGranularity(axis=0, group_size=16)
        PerGroupedChannelGranularity(axis=0, group_size=16)
    """

    type: Literal["per_grouped_channel"] = Field(default="per_grouped_channel", repr=False)
    axis: Annotated[int, Field(ge=0, le=1)] | None = None
    group_size: Annotated[int, Field(gt=0)]


class PerChannelGranularity(SpecModel):
    """One scale per channel of `axis` (None: the op's output-channel axis).

    Examples:
        >>> PerChannelGranularity(axis=0)
        PerChannelGranularity(axis=0)
    """

    type: Literal["per_channel"] = Field(default="per_channel", repr=False)
    axis: int | None = None


class PerBlockGranularity(SpecModel):
    """One scale per block.

    Attributes:
        axis: Axis along which a scalar `block_size` runs; None is the op's input-channel axis. Every
            other axis of an activation has blocks of 1.
        block_size: Elements per block along `axis`, or one size per tensor axis; -1 is a whole axis.

    Examples:
        >>> PerBlockGranularity(block_size=32)  # along the input channels
        PerBlockGranularity(axis=None, block_size=32)
        >>> PerBlockGranularity(axis=-1, block_size=-1)  # activations with a scale per token
        PerBlockGranularity(axis=-1, block_size=-1)
    """

    type: Literal["per_block"] = Field(default="per_block", repr=False)
    axis: int | None = None
    block_size: (
        Annotated[int, Field(gt=0)]
        | Literal[-1]
        | tuple[Annotated[int, Field(gt=0)] | Literal[-1], ...]
    )


PalettizationGranularity = Annotated[
    PerTensorGranularity | PerGroupedChannelGranularity, Field(discriminator="type")
]
QuantizationGranularity = Annotated[
    PerTensorGranularity
    | PerChannelGranularity
    | PerBlockGranularity
    | PerGroupedChannelGranularity,
    Field(discriminator="type"),
]


def resolve_block_sizes(tensor_shape: Sequence[int], block_sizes: Sequence[int]) -> list[int]:
    """Extent of a block along each axis, -1 being the whole axis.

    Args:
        tensor_shape: Shape of what is divided into blocks.
        block_sizes: One size per axis.

    Raises:
        ConfigError: There is not one size per axis, a size is neither positive nor -1, or it does
            not divide its axis.

    Examples:
        >>> resolve_block_sizes((64, 128), (1, -1))
        [1, 128]
    """
    if len(block_sizes) != len(tensor_shape):
        raise ConfigError(
            f"block_size has {len(block_sizes)} sizes, the tensor {len(tensor_shape)} axes"
        )
    resolved = [
        extent if size == -1 else size
        for extent, size in zip(tensor_shape, block_sizes, strict=True)
    ]
    for axis, (extent, size) in enumerate(zip(tensor_shape, resolved, strict=True)):
        if size < 1:
            raise ConfigError(f"block_size[{axis}] must be positive, or -1 for all, got {size}")
        if extent % size:
            raise ConfigError(
                f"blocks of {size} do not divide the {extent} elements of axis {axis}"
            )
    return resolved


def value_block_sizes(granularity: SpecModel, shape: Sequence[int]) -> tuple[int, ...]:
    """Block sizes of an activation, which has other axes than a weight.

    With a scalar `block_size` every other axis has blocks of 1, so that one scale belongs to a run of
    values at one position, as in coreai-opt.

    Args:
        granularity: Of an activation's spec.
        shape: Its shape; only axes that are divided must be known.

    Returns:
        One size per axis, -1 being the whole axis; () for one scale.

    Raises:
        ConfigError: The granularity is of weights only, or does not fit the shape.

    Examples:
        >>> value_block_sizes(PerBlockGranularity(axis=-1, block_size=64), (2, 5, 64))  # per token
        (1, 1, -1)
    """
    rank = len(shape)
    if isinstance(granularity, PerTensorGranularity):
        return ()
    axis = getattr(granularity, "axis", None)
    if axis is not None and not -rank <= axis < rank:
        raise ConfigError(f"{granularity} has axis {axis}, the value has rank {rank}")
    if isinstance(granularity, PerChannelGranularity) and axis is not None:
        return tuple(1 if place == axis % rank else -1 for place in range(rank))
    if not isinstance(granularity, PerBlockGranularity):
        raise ConfigError(f"activations have no {granularity}")
    sizes = granularity.block_size
    if isinstance(sizes, int):
        if axis is None:
            raise ConfigError(f"{granularity}: activations need an axis, as -1 for the last one")
        sizes = tuple(sizes if place == axis % rank else 1 for place in range(rank))
    if len(sizes) != rank:
        raise ConfigError(f"block_size has {len(sizes)} sizes, the value {rank} axes")
    for place, (extent, size) in enumerate(zip(shape, sizes, strict=True)):
        if size > 1 and (not isinstance(extent, int) or extent % size):
            raise ConfigError(f"blocks of {size} do not divide the {extent} values of axis {place}")
    given = zip(shape, sizes, strict=True)
    return tuple(-1 if size > 1 and size == extent else size for extent, size in given)
