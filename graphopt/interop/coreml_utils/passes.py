"""palettize_weights and quantize_weights on a Core ML model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from graphopt.backends.coreml.ir import BuiltProgram, Weight, open_model
from graphopt.config.selection import closest
from graphopt.errors import CompressionError, ConfigError
from graphopt.numerics.parallel import map_tasks
from graphopt.schemes.layout import plan_layout
from graphopt.schemes.palettize import PalettizedWeight, palettize
from graphopt.schemes.quantize import QuantizedWeight, plan_blocks, quantize_weight
from graphopt.specs import (
    PalettizationSpec,
    PerBlockGranularity,
    PerChannelGranularity,
    PerGroupedChannelGranularity,
    PerTensorGranularity,
    QuantizationFormulation,
    QuantizationSpec,
)
from graphopt.specs.dtypes import dtype_name
from graphopt.specs.model import SpecModel

__all__ = ["WeightInfo", "palettize_weights", "quantize_weights", "weights_of"]

_log = logging.getLogger(__name__)
_BLOCKS = (PerBlockGranularity, PerGroupedChannelGranularity)  # need iOS 18
_TYPES = ("int4", "uint4", "int8", "uint8")
SpecT = TypeVar("SpecT", bound=SpecModel)


@dataclass(frozen=True)
class WeightInfo:
    """A weight of a Core ML model, by the names that specs are given for.

    Attributes:
        name: Name of the constant.
        ops: (name, type) of the ops that read it.
        shape: Its shape.
        dtype: Its type.

    Examples:
        >>> from graphopt.coreml_utils import weights_of
        >>> package = graphopt.lower(program, "coreml").model  # an MLModel
        >>> isinstance(weights_of(package)[0], WeightInfo), weights_of(package)[0].shape
        (True, (8, 16))
    """

    name: str
    ops: tuple[tuple[str, str], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


def weights_of(model: Any) -> tuple[WeightInfo, ...]:
    """The weights of a model that are not compressed yet, in the order of the program.

    Raises:
        InputError: It is no `MLModel` of type ML program.

    Examples:
        >>> package = graphopt.lower(program, "coreml").model  # an MLModel
        >>> [weight.shape for weight in weights_of(package)]
        [(8, 16), (4, 8)]
    """
    weights = open_model(model, modern=False).weights()
    return tuple(
        WeightInfo(weight.name, weight.users, tuple(weight.shape), weight.value().dtype)
        for weight in weights
    )


def palettize_weights(
    model: Any,
    spec: PalettizationSpec | None = PalettizationSpec(),  # noqa: B008 - a frozen value
    *,
    op_type_specs: Mapping[str, PalettizationSpec | None] | None = None,
    name_specs: Mapping[str, PalettizationSpec | None] | None = None,
    weight_threshold: int = 2048,
    seed: int = 0,
) -> Any:
    """Replace the weights of a model by lookups of k-means tables.

    >>> package = graphopt.lower(graphopt.capture(model, example), "coreml").model  # an MLModel
    >>> small = palettize_weights(package, weight_threshold=0)
    >>> small.save("small.mlpackage")

    Weights of convolutions (transposed too), linear and recurrent layers, matrix products and gathers
    are clustered exactly, as `KMeansPalettizer` does. The given model stays as it is; states,
    functions, descriptions and metadata are kept. Tables per group, of vectors or integers, scales
    and 3 bits need iOS 18: an older model is raised to it, with a warning in the log, unless it
    holds tables or sparse weights already.

    Args:
        model: An `MLModel` of type ML program, loaded (`skip_model_load=True` will do) or converted.
        spec: What weights become; None leaves those that no other key names.
        op_type_specs: MIL op type, such as "conv" → spec, or None to leave its weights.
        name_specs: Name of a weight or of an op that reads it (`weights_of`) → spec, or None. A
            weight's own name counts before an op's, that before its type.
        weight_threshold: Weights of no more elements stay unless a name asks for them.
        seed: Seed of vector tables.

    Returns:
        A new `MLModel`, not loaded; `save` it.

    Raises:
        ConfigError: A key matches nothing, or a spec asks for what Core ML cannot hold.
        CompressionError: A weight contains NaN or Inf, or cannot be clustered so.
        InputError: It is no `MLModel` of type ML program.
        MissingDependencyError: coremltools is not installed.
    """
    rules = _Rules(spec, op_type_specs or {}, name_specs or {}, weight_threshold)
    rules.refuse(_problem_of_tables)

    def compress(weight: Weight, value: Tensor, wanted: PalettizationSpec) -> PalettizedWeight:
        note = plan_layout(value.shape, weight.output_axis, wanted).note
        if note:
            _log.warning("%s: %s", weight.name, note)
        return palettize(value, wanted, output_axis=weight.output_axis, seed=seed)

    return _compressed(open_model(model, modern=rules.any(_tables_need_ios18)), rules, compress)


def quantize_weights(
    model: Any,
    spec: QuantizationSpec | None = QuantizationSpec(granularity=PerChannelGranularity()),  # noqa: B008
    *,
    op_type_specs: Mapping[str, QuantizationSpec | None] | None = None,
    name_specs: Mapping[str, QuantizationSpec | None] | None = None,
    weight_threshold: int = 2048,
) -> Any:
    """Replace the weights of a model by integers with scales.

    Args:
        model: An `MLModel` of type ML program.
        spec: What weights become: int8, uint8, int4 or uint4; None leaves those that no other key
            names. Blocks and 4 bits need iOS 18: an older model is raised to it.
        op_type_specs: As for `palettize_weights`.
        name_specs: As for `palettize_weights`.
        weight_threshold: Weights of no more elements stay unless a name asks for them.

    Returns:
        A new `MLModel`, not loaded; `save` it.

    Raises:
        ConfigError: A key matches nothing, or a spec asks for what Core ML cannot hold.
        CompressionError: A weight contains NaN or Inf, or cannot be quantized so.
        InputError: It is no `MLModel` of type ML program.
        MissingDependencyError: coremltools is not installed.

    Examples:
        >>> package = graphopt.lower(program, "coreml").model  # an MLModel
        >>> small = quantize_weights(package, weight_threshold=0)
        >>> small.save("small.mlpackage")
    """
    rules = _Rules(spec, op_type_specs or {}, name_specs or {}, weight_threshold)
    rules.refuse(_problem_of_integers)

    def compress(weight: Weight, value: Tensor, wanted: QuantizationSpec) -> QuantizedWeight:
        blocks, note = plan_blocks(value.shape, weight.output_axis, wanted.granularity)
        if note:
            _log.warning("%s: %s", weight.name, note)
        return quantize_weight(value, wanted, blocks)

    return _compressed(open_model(model, modern=rules.any(_integers_need_ios18)), rules, compress)


def _problem_of_tables(spec: PalettizationSpec) -> str:
    if spec.outlier_fraction:
        return "outlier_fraction is not there for built models; use 0"
    entries = None if spec.lut_qspec is None else spec.lut_qspec.dtype
    if entries is not None and dtype_name(entries) not in ("int8", "uint8"):
        return f"Core ML's tables are float, int8 or uint8, not {entries}"
    return ""


def _problem_of_integers(spec: QuantizationSpec) -> str:
    if dtype_name(spec.dtype) not in _TYPES:
        return f"Core ML holds weights of {_TYPES}, not {dtype_name(spec.dtype)}"
    if spec.scale_dtype is torch.float8_e8m0fnu:
        return "Core ML's scales are float16 or float32, not float8_e8m0fnu"
    if spec.qformulation is QuantizationFormulation.MINVAL:
        return "Core ML has no float minimum; use qformulation 'zp'"
    return ""


def _integers_need_ios18(spec: QuantizationSpec) -> bool:
    return "4" in dtype_name(spec.dtype) or isinstance(spec.granularity, _BLOCKS)


def _tables_need_ios18(spec: PalettizationSpec) -> bool:
    plain = isinstance(spec.granularity, PerTensorGranularity) and spec.cluster_dim == 1
    scaled = spec.enable_per_channel_scale or spec.lut_qspec is not None
    return not plain or scaled or spec.n_bits == 3


@dataclass(frozen=True)
class _Rules:
    """Which spec a weight gets."""

    default: Any
    types: Mapping[str, Any]
    names: Mapping[str, Any]
    threshold: int

    def any(self, needs: Callable[[Any], bool]) -> bool:
        """Whether a spec of any weight needs something."""
        return any(map(needs, self._specs()))

    def refuse(self, problem_of: Callable[[Any], str]) -> None:
        """Refuse specs that Core ML cannot hold.

        Args:
            problem_of: What is wrong with a spec, or "".

        Raises:
            ConfigError: A spec asks for what Core ML cannot hold.
        """
        for spec in self._specs():
            problem = problem_of(spec)
            if problem:
                raise ConfigError(problem)

    def _specs(self) -> list[Any]:
        given = (self.default, *self.types.values(), *self.names.values())
        return [spec for spec in given if spec is not None]

    def spec_of(self, weight: Weight) -> Any:
        """The spec of a weight, or None.

        Raises:
            ConfigError: Two of its ops ask for different ones.
        """
        if weight.name in self.names:
            return self.names[weight.name]
        named = [self.names[name] for name, _ in weight.users if name in self.names]
        typed = [self.types[kind] for _, kind in weight.users if kind in self.types]
        for matches in (named, typed):
            if any(match != matches[0] for match in matches[1:]):
                raise ConfigError(
                    f"{weight.name}: its ops {weight.users} ask for different specs; name the weight"
                )
        if named:
            return named[0]
        small = weight.op.outputs[0].val.size <= self.threshold
        return None if small else typed[0] if typed else self.default

    def check(self, weights: list[Weight]) -> None:
        """Refuse keys that match nothing.

        Raises:
            ConfigError: With the closest names.
        """
        names = {weight.name for weight in weights}
        names |= {name for weight in weights for name, _ in weight.users}
        types = {kind for weight in weights for _, kind in weight.users}
        problems = [
            f"{section}[{key!r}] matches no weight; closest: {', '.join(closest(key, sorted(known)))}"
            for section, given, known in (
                ("name_specs", self.names, names),
                ("op_type_specs", self.types, types),
            )
            for key in given
            if key not in known
        ]
        if problems:
            raise ConfigError("\n".join(problems))


def _compressed(
    program: BuiltProgram,
    rules: _Rules,
    compress: Callable[[Weight, Tensor, Any], PalettizedWeight | QuantizedWeight],
) -> Any:
    weights = program.weights()
    rules.check(weights)
    chosen = [(weight, spec) for weight in weights if (spec := rules.spec_of(weight)) is not None]
    # functions of one model hold copies of the same weights
    known: dict[Any, int] = {}
    work: list[tuple[Weight, Tensor, Any]] = []
    places = []
    for weight, spec in chosen:
        value = weight.value()
        key = (
            tuple(value.shape),
            weight.output_axis,
            spec,
            hashlib.sha256(value.numpy().data).digest(),
        )
        if key not in known:
            known[key] = len(work)
            work.append((weight, value, spec))
        places.append(known[key])

    def one(place: int) -> PalettizedWeight | QuantizedWeight:
        weight, value, spec = work[place]
        try:
            return compress(weight, value, spec)
        except CompressionError as error:
            raise CompressionError(f"{weight.name}: {error}") from None

    order = sorted(range(len(work)), key=lambda place: -work[place][1].numel())
    forms = dict(zip(order, map_tasks(one, order), strict=True))
    for (weight, _), place in zip(chosen, places, strict=True):
        if weight.ambiguous:
            _log.warning(
                "%s: its ops %s do not agree on the output channels; axis %d counts",
                weight.name,
                [name for name, _ in weight.users],
                weight.output_axis,
            )
        program.replace(weight, forms[place])
    if not chosen:
        _log.warning("no weight was compressed; there are %d", len(weights))
    return program.model()
