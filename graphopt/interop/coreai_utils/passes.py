"""palettize_weights, quantize_weights and sparsify_weights on a Core AI program."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from graphopt.backends.coreai.ir import Constant, find_constants, replace_constant
from graphopt.errors import CompressionError, ConfigError, InputError
from graphopt.extras import require
from graphopt.interop.coreai_utils.common import (
    CompressionGranularity,
    DType,
    QScheme,
    check_whole,
    option_of,
    torch_dtype,
)
from graphopt.numerics.parallel import map_tasks
from graphopt.schemes.layout import plan_layout
from graphopt.schemes.palettize import PalettizedWeight, palettize
from graphopt.schemes.prune import PrunedWeight, mask_of, prune, unfit
from graphopt.schemes.quantize import QuantizedWeight, plan_blocks, quantize_weight
from graphopt.specs import (
    PalettizationSpec,
    PerBlockGranularity,
    PerChannelGranularity,
    PerGroupedChannelGranularity,
    PerTensorGranularity,
    PruningSpec,
    QuantizationSpec,
)
from graphopt.specs.pruning import BlockStructured, NMStructured, Unstructured

__all__ = ["palettize_weights", "quantize_weights", "sparsify_weights"]

_log = logging.getLogger(__name__)
_Gran = CompressionGranularity
_BITS = (1, 2, 3, 4, 6, 8)
_EIGHT = (DType.INT8, DType.UINT8, DType.FP8_E4M3FN, DType.FP8_E5M2)
_Stored = PalettizedWeight | QuantizedWeight | PrunedWeight
_Form = tuple[_Stored, PalettizedWeight | QuantizedWeight | None]


def palettize_weights(
    coreai_program: Any,
    lut_dtype: DType | str | None = None,
    n_bits: int = 4,
    granularity: CompressionGranularity | str = CompressionGranularity.PER_TENSOR,
    group_size: int = 32,
    cluster_dim: int = 1,
    enable_per_channel_scale: bool = False,
    weight_num_threshold: int = 1024,
    num_kmeans_workers: int = 4,
    enable_fast_kmeans_mode: bool = True,
    rounding_precision: int = 4,
    in_place: bool = False,
) -> Any:
    """Replace the weights of a program by lookups of k-means tables.

    >>> from coreai.authoring import AIModelAsset
    >>> captured = graphopt.capture(model, example)
    >>> path = graphopt.lower(captured, "coreai").save("model.aimodel")
    >>> program = AIModelAsset.load(path).program
    >>> small = palettize_weights(program, n_bits=4, weight_num_threshold=0)
    >>> saved = small.save_asset(path.with_name("small.aimodel"))

    Constants that convolutions (transposed too), matrix products and gathers read as weights, also
    through transposes and casts, are clustered exactly, as `KMeansPalettizer` does.

    Args:
        coreai_program: An `AIProgram`, as a converter gives it or of a loaded asset.
        lut_dtype: Element type of the tables: int8, uint8, fp8_e4m3fn, fp8_e5m2; None keeps the
            weight's own.
        n_bits: 1, 2, 3, 4, 6 or 8.
        granularity: PER_TENSOR, PER_CHANNEL (a table per output channel) or PER_GROUPED_CHANNEL.
        group_size: Output channels per table with PER_GROUPED_CHANNEL; 0 is all. One that does not
            divide becomes the nearest divisor, or one table if tables would outgrow the codes.
        cluster_dim: Length of an entry, along the output channels. A weight whose channels it does
            not divide stays, with a warning in the log.
        enable_per_channel_scale: Divide every output channel by its largest magnitude first.
        weight_num_threshold: Constants of no more elements stay.
        num_kmeans_workers: Accepted for compatibility; clustering uses torch's threads.
        enable_fast_kmeans_mode: Accepted for compatibility; clustering is exact and fast.
        rounding_precision: Accepted for compatibility; nothing is rounded.
        in_place: Change the given program instead of a copy.

    Returns:
        The program with compressed weights: a copy, or the given one.

    Raises:
        ConfigError: An option has a wrong value.
        CompressionError: A weight contains NaN or Inf; nothing was changed.
        InputError: It is no `AIProgram`.
        MissingDependencyError: coreai-core is not installed.
    """
    del num_kmeans_workers, enable_fast_kmeans_mode, rounding_precision
    allowed = (_Gran.PER_TENSOR, _Gran.PER_CHANNEL, _Gran.PER_GROUPED_CHANNEL)
    kind = option_of(_Gran, granularity, allowed, "granularity")
    if n_bits not in _BITS:
        raise ConfigError(f"n_bits must be one of {_BITS}, got {n_bits!r}")
    check_whole(cluster_dim, "cluster_dim", 1)
    check_whole(group_size, "group_size", 0)
    entries = None
    if lut_dtype is not None:
        entries = QuantizationSpec(
            dtype=torch_dtype(option_of(DType, lut_dtype, _EIGHT, "lut_dtype"))
        )

    def compress(constant: Constant, value: Tensor) -> _Form | str:
        groups: Any = PerTensorGranularity()
        size = 1 if kind is _Gran.PER_CHANNEL else group_size
        if kind is not _Gran.PER_TENSOR and size:
            groups = PerGroupedChannelGranularity(group_size=size)
        spec = PalettizationSpec(
            n_bits=n_bits,
            lut_qspec=entries,
            granularity=groups,
            cluster_dim=cluster_dim,
            enable_per_channel_scale=enable_per_channel_scale,
        )
        try:
            note = plan_layout(value.shape, constant.output_axis, spec).note
        except CompressionError as error:
            return str(error)
        if note:
            _log.warning("%s: %s", constant.name, note)
        return palettize(value, spec, output_axis=constant.output_axis), None

    return _compressed(coreai_program, compress, weight_num_threshold, in_place)


def quantize_weights(
    coreai_program: Any,
    dtype: DType | str,
    qscheme: QScheme | str = QScheme.SYMMETRIC,
    granularity: CompressionGranularity | str = CompressionGranularity.PER_CHANNEL,
    block_size: int = 32,
    weight_num_threshold: int = 1024,
    scale_dtype: DType | str | None = None,
    in_place: bool = False,
) -> Any:
    """Replace the weights of a program by integers or narrow floats with scales.

    Args:
        coreai_program: An `AIProgram`.
        dtype: int2, int4, int8, uint2, uint4, uint8, fp4_e2m1fn, fp8_e4m3fn or fp8_e5m2.
        qscheme: SYMMETRIC, or ASYMMETRIC with zero points (integers only).
        granularity: PER_TENSOR, PER_CHANNEL (output channels) or PER_BLOCK (of every output channel,
            runs of `block_size` input channels). fp4 needs PER_BLOCK of 32.
        block_size: Input channels per scale; one that does not divide becomes the nearest divisor.
        weight_num_threshold: Constants of no more elements stay.
        scale_dtype: fp8_e8m0fnu stores the scales of fp8 weights as powers of two; None is the
            weight's own type.
        in_place: Change the given program instead of a copy.

    Returns:
        The program with compressed weights: a copy, or the given one.

    Raises:
        ConfigError: An option has a wrong value, or options do not go together.
        CompressionError: A weight contains NaN or Inf; nothing was changed.
        InputError: It is no `AIProgram`.
        MissingDependencyError: coreai-core is not installed.

    Examples:
        >>> from coreai.authoring import AIModelAsset
        >>> path = graphopt.lower(program, "coreai").save("model.aimodel")
        >>> asset = AIModelAsset.load(path)
        >>> small = quantize_weights(asset.program, "int8", weight_num_threshold=0)
        >>> saved = small.save_asset(path.with_name("small.aimodel"))
    """
    types = tuple(member for member in DType if member is not DType.FP8_E8M0FNU)
    wanted = option_of(DType, dtype, types, "dtype")
    scheme = option_of(QScheme, qscheme, tuple(QScheme), "qscheme")
    allowed = (_Gran.PER_TENSOR, _Gran.PER_CHANNEL, _Gran.PER_BLOCK)
    kind = option_of(_Gran, granularity, allowed, "granularity")
    if wanted is DType.FP4_E2M1FN and (kind is not _Gran.PER_BLOCK or block_size != 32):
        raise ConfigError(
            "fp4_e2m1fn has one scale per block of 32; use PER_BLOCK and block_size=32"
        )
    check_whole(block_size, "block_size", 1)
    scales = None
    if scale_dtype is not None:
        scale_type = option_of(DType, scale_dtype, (DType.FP8_E8M0FNU,), "scale_dtype")
        if not wanted.value.startswith("fp8"):
            raise ConfigError(
                f"scale_dtype={scale_type.value} is for fp8 weights, not for {wanted.value}"
            )
        scales = torch_dtype(scale_type)

    def compress(constant: Constant, value: Tensor) -> _Form | str:
        blocks: Any = PerTensorGranularity()
        if kind is _Gran.PER_CHANNEL:
            blocks = PerChannelGranularity(axis=constant.output_axis)
        elif kind is _Gran.PER_BLOCK:
            sizes = list(constant.shape)
            sizes[constant.output_axis] = 1
            if constant.input_axis is not None:
                sizes[constant.input_axis] = min(block_size, sizes[constant.input_axis])
            blocks = PerBlockGranularity(block_size=tuple(sizes))
        if wanted is DType.FP4_E2M1FN and constant.shape[-1] % 2:
            return f"fp4 needs an even last axis, it has {constant.shape[-1]}"
        spec = QuantizationSpec(
            dtype=torch_dtype(wanted),
            qscheme=scheme.scheme,
            granularity=blocks,
            scale_dtype=scales,
        )
        plan, note = plan_blocks(value.shape, constant.output_axis, spec.granularity)
        if note:
            _log.warning("%s: %s", constant.name, note)
        return quantize_weight(value, spec, plan), None

    return _compressed(coreai_program, compress, weight_num_threshold, in_place)


def sparsify_weights(
    coreai_program: Any,
    target_sparsity: float | None = 0.5,
    block_size: int | None = None,
    n_m_ratio: tuple[int, int] | None = None,
    quantize_dtype: DType | str | None = None,
    palettize_nbits: int | None = None,
    weight_num_threshold: int = 1024,
    in_place: bool = False,
) -> Any:
    """Set the smallest elements of the weights of a program to zero and store the others.

    Args:
        coreai_program: An `AIProgram`.
        target_sparsity: Share of zeros in [0, 1]; None with `n_m_ratio`.
        block_size: Let runs of that many output channels become zero together; None is single
            elements.
        n_m_ratio: (n, m): n of every m input channels become zero.
        quantize_dtype: Store the values that stay as int8, uint8, fp8_e4m3fn or fp8_e5m2 with one
            scale.
        palettize_nbits: Store them as codes of 1, 2, 3, 4, 6 or 8 bits and one table.
        weight_num_threshold: Constants of no more elements stay.
        in_place: Change the given program instead of a copy.

    Returns:
        The program with compressed weights: a copy, or the given one. Weights whose channels
        `block_size` or m do not divide stay, with a warning in the log.

    Raises:
        ConfigError: An option has a wrong value, or options do not go together.
        CompressionError: A weight contains NaN or Inf; nothing was changed.
        InputError: It is no `AIProgram`.
        MissingDependencyError: coreai-core is not installed.

    Examples:
        >>> from coreai.authoring import AIModelAsset
        >>> path = graphopt.lower(program, "coreai").save("model.aimodel")
        >>> asset = AIModelAsset.load(path)
        >>> small = sparsify_weights(asset.program, target_sparsity=0.5, weight_num_threshold=0)
        >>> saved = small.save_asset(path.with_name("small.aimodel"))
    """
    if (target_sparsity is None) == (n_m_ratio is None):
        raise ConfigError("give either target_sparsity or n_m_ratio (with target_sparsity=None)")
    if target_sparsity is not None and not (
        isinstance(target_sparsity, int | float) and 0 <= target_sparsity <= 1
    ):
        raise ConfigError(f"target_sparsity must be in [0, 1], got {target_sparsity!r}")
    if block_size is not None:
        check_whole(block_size, "block_size", 2)
        if n_m_ratio is not None:
            raise ConfigError("block_size has no meaning with n_m_ratio")
    if n_m_ratio is not None and not _is_ratio(n_m_ratio):
        raise ConfigError(f"n_m_ratio must be whole numbers 0 ≤ n ≤ m, m > 0, got {n_m_ratio}")
    if quantize_dtype is not None and palettize_nbits is not None:
        raise ConfigError("give either quantize_dtype or palettize_nbits")
    if palettize_nbits is not None and palettize_nbits not in _BITS:
        raise ConfigError(f"palettize_nbits must be one of {_BITS}, got {palettize_nbits!r}")
    stored = None
    if quantize_dtype is not None:
        stored_type = option_of(DType, quantize_dtype, _EIGHT, "quantize_dtype")
        stored = QuantizationSpec(dtype=torch_dtype(stored_type))

    def compress(constant: Constant, value: Tensor) -> _Form | str:
        scheme: Any = Unstructured()
        if n_m_ratio is not None:
            axis = constant.input_axis
            if axis is None:
                return "it has no input channels"
            scheme = NMStructured(n=n_m_ratio[0], m=n_m_ratio[1], axis=axis)
        elif block_size is not None:
            scheme = BlockStructured(axis=constant.output_axis, block_size=block_size)
        spec = PruningSpec(
            target_sparsity=0.0 if target_sparsity is None else target_sparsity,
            pruning_scheme=scheme,
        )
        reason = unfit(constant.shape, spec)
        if reason:
            return reason
        pruned = prune(value, mask_of(value, spec))
        if not pruned.values.numel():
            return pruned, None
        if palettize_nbits is not None:
            return pruned, palettize(pruned.values, PalettizationSpec(n_bits=palettize_nbits))
        if stored is not None:
            blocks, _ = plan_blocks(pruned.values.shape, 0, stored.granularity)
            return pruned, quantize_weight(pruned.values, stored, blocks)
        return pruned, None

    return _compressed(coreai_program, compress, weight_num_threshold, in_place)


def _is_ratio(value: Any) -> bool:
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return all(type(part) is int for part in value) and 0 <= value[0] <= value[1] and value[1] > 0


def _compressed(
    program: Any,
    compress: Callable[[Constant, Tensor], _Form | str],
    threshold: int,
    in_place: bool,
) -> Any:
    """Compute all forms, then put them in place: an error leaves the program as it was."""
    authoring = require("coreai.authoring", "coreai")
    if not isinstance(program, authoring.AIProgram):
        raise InputError(
            f"expected an AIProgram, got {type(program).__name__}; of an asset it is"
            " AIModelAsset.load(path).program"
        )
    check_whole(threshold, "weight_num_threshold", 0)
    target = program if in_place else copy.deepcopy(program)
    constants = find_constants(target, threshold)
    values = [constant.value() for constant in constants]

    def one(place: int) -> _Form | str:
        try:
            return compress(constants[place], values[place])
        except CompressionError as error:
            raise CompressionError(f"{constants[place].name}: {error}") from None

    order = sorted(range(len(constants)), key=lambda place: -values[place].numel())
    forms = dict(zip(order, map_tasks(one, order), strict=True))
    done = 0
    for place, constant in enumerate(constants):
        form = forms[place]
        if isinstance(form, str):
            _log.warning("%s: left as it is: %s", constant.name, form)
            continue
        if constant.ambiguous:
            _log.warning(
                "%s: its ops %s do not agree on the output channels; axis %d counts",
                constant.name,
                constant.users,
                constant.output_axis,
            )
        replace_constant(constant, *form)
        done += 1
    elements = sum(math.prod(constant.shape) for constant in constants)
    _log.info("compressed %d weights of %d elements", done, elements)
    if not done:
        _log.warning("no weight of more than %d elements was compressed", threshold)
    return target
