"""Candidates: the named compression specs among which each layer chooses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from graphopt.config.base import read_yaml
from graphopt.errors import ConfigError
from graphopt.specs import (
    PalettizationSpec,
    PerBlockGranularity,
    PerChannelGranularity,
    PerGroupedChannelGranularity,
    QuantizationScheme,
    QuantizationSpec,
)
from graphopt.specs.dtypes import dtype_name, parse_dtype
from graphopt.specs.granularity import PerTensorGranularity

__all__ = ["KEEP", "Candidate", "CandidateLike", "as_candidates", "read_candidates", "spec_name"]

WeightSpec = PalettizationSpec | QuantizationSpec
_PALETTE = re.compile(r"(\d)(?:-bit)?(?: ?g(\d+))?(?: ?v(\d+))?")
_INTEGER = re.compile(r"(u?int\d|fp8_e4m3|fp8_e5m2|fp4_e2m1)(?: ?b(\d+))?(?: ?a(8))?")


@dataclass(frozen=True)
class Candidate:
    """What one layer could become.

    Attributes:
        name: Name in tables, recipes and files.
        weight: Spec of the weight; None leaves it uncompressed.
        activation: Spec of the op's data input; None leaves it in float.
    """

    name: str
    weight: WeightSpec | None = None
    activation: QuantizationSpec | None = None

    def __post_init__(self) -> None:
        act = self.activation
        if act is not None and not isinstance(act.granularity, PerTensorGranularity):
            raise ConfigError(f"candidate {self.name!r}: activations have one scale per tensor")

    @property
    def is_kept(self) -> bool:
        """Whether it changes nothing."""
        return self.weight is None and self.activation is None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` reads them."""
        found: dict[str, Any] = {}
        if self.weight is not None:
            kind = "palettize" if isinstance(self.weight, PalettizationSpec) else "quantize"
            found[kind] = _dumped(self.weight)
        if self.activation is not None:
            found["activation"] = _dumped(self.activation)
        return found

    @classmethod
    def from_dict(cls, name: str, data: Mapping[str, Any]) -> Candidate:
        """Read `{"palettize": {...}}`, `{"quantize": {...}}`, each with "activation", or `{}`.

        Raises:
            ConfigError: A key is unknown, a value is wrong, or both kinds are given.
        """
        known = {"palettize", "quantize", "activation"}
        unknown = sorted(set(data) - known)
        if unknown or ("palettize" in data and "quantize" in data):
            raise ConfigError(
                f"candidate {name!r}: give one of 'palettize' and 'quantize', and 'activation' if"
                f" wanted; got {sorted(data)}"
            )
        try:
            weight: WeightSpec | None = None
            if "palettize" in data:
                weight = PalettizationSpec.model_validate(data["palettize"])
            elif "quantize" in data:
                weight = QuantizationSpec.model_validate(data["quantize"])
            act = data.get("activation")
            return cls(name, weight, None if act is None else QuantizationSpec.model_validate(act))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"candidate {name!r}: {where}: {first['msg']}") from None


def _dumped(spec: WeightSpec) -> dict[str, Any]:
    """The fields that are not at their defaults, whole."""
    named = spec.model_dump(exclude_defaults=True)
    return {key: value for key, value in spec.model_dump(mode="json").items() if key in named}


KEEP = Candidate("keep")
CandidateLike = (
    int | str | PalettizationSpec | QuantizationSpec | Candidate | Mapping[str, Any] | None
)


def as_candidates(
    given: Sequence[CandidateLike] | Mapping[str, CandidateLike],
) -> tuple[Candidate, ...]:
    """Candidates from what people write.

    Args:
        given: A sequence of specs, or a mapping of names to specs. A spec is a `PalettizationSpec`,
            a `QuantizationSpec`, a `Candidate`, a number of bits (one table per tensor), a mapping
            as `Candidate.from_dict` reads it, None or "keep", or a short text: "4" or "4-bit",
            "4 g16" (a table per 16 channels), "8 v4" (entries of 4), "int8" (a scale per channel),
            "int4 b32" (a scale per block of 32), "int8 a8" (with int8 activations).

    Raises:
        ConfigError: A spec cannot be read, two have one name, or there is none.
    """
    named: Iterable[tuple[str | None, CandidateLike]]
    if isinstance(given, Mapping):
        named = given.items()
    elif isinstance(given, str) or not isinstance(given, Sequence):
        raise ConfigError(f"candidates must be a sequence or a mapping, got {given!r}")
    else:
        named = ((None, each) for each in given)
    found = [_candidate(name, each) for name, each in named]
    if not found:
        raise ConfigError("there are no candidates")
    names = [candidate.name for candidate in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"several candidates are called {twice}; name them by a mapping")
    return tuple(found)


def read_candidates(path: Path) -> tuple[tuple[Candidate, ...], dict[str, tuple[Candidate, ...]]]:
    """Read a YAML file with `candidates` and, if wanted, `layers` (pattern → candidates).

    Raises:
        ConfigError: The file is no such mapping.
    """
    data = read_yaml(path, "candidates")
    unknown = sorted(set(data) - {"candidates", "layers"})
    if unknown or "candidates" not in data:
        raise ConfigError(
            f"{path.name}: needs 'candidates' and may have 'layers', got {sorted(data)}"
        )
    layers = data.get("layers") or {}
    return as_candidates(data["candidates"]), {
        pattern: as_candidates(each) for pattern, each in layers.items()
    }


def _candidate(name: str | None, given: CandidateLike) -> Candidate:
    if isinstance(given, Candidate):
        return given if name is None else Candidate(name, given.weight, given.activation)
    if given is None or given == "keep":
        return Candidate(name or KEEP.name)
    if isinstance(given, Mapping):
        if name is None:
            raise ConfigError(f"a candidate given as a mapping needs a name: {dict(given)}")
        return Candidate.from_dict(name, given)
    if isinstance(given, PalettizationSpec | QuantizationSpec):
        return Candidate(name or spec_name(given), given)
    weight, activation = _parsed(str(given).strip())
    return Candidate(name or _joined(weight, activation), weight, activation)


def _joined(weight: WeightSpec, activation: QuantizationSpec | None) -> str:
    text = spec_name(weight)
    return text if activation is None else f"{text}, {spec_name(activation)} inputs"


def _parsed(text: str) -> tuple[WeightSpec, QuantizationSpec | None]:
    try:
        if match := _PALETTE.fullmatch(text):
            bits, group, length = match.groups()
            options: dict[str, Any] = {"n_bits": int(bits), "cluster_dim": int(length or 1)}
            if group:
                options["granularity"] = PerGroupedChannelGranularity(group_size=int(group))
            return PalettizationSpec(**options), None
        if match := _INTEGER.fullmatch(text):
            kind, block, activation = match.groups()
            per = PerBlockGranularity(block_size=int(block)) if block else PerChannelGranularity()
            weight = QuantizationSpec(dtype=parse_dtype(kind), granularity=per)
            return weight, QuantizationSpec() if activation else None
    except (ValidationError, ValueError) as error:
        raise ConfigError(f"candidate {text!r}: {error}") from None
    raise ConfigError(
        f"candidate {text!r} is not understood; write e.g. 4, '4 g16', '8 v4', 'int8', 'int4 b32',"
        " 'int8 a8' or 'keep'"
    )


def spec_name(spec: WeightSpec) -> str:
    """A short name of a spec, such as "4-bit", "4-bit g16" or "int8"."""
    per = spec.granularity
    if isinstance(spec, PalettizationSpec):
        parts = [f"{spec.n_bits}-bit"]
        if isinstance(per, PerGroupedChannelGranularity):
            parts.append(f"g{per.group_size}" + (f" axis {per.axis}" if per.axis else ""))
        parts += [f"v{spec.cluster_dim}"] if spec.cluster_dim > 1 else []
        parts += [f"{dtype_name(spec.lut_qspec.dtype)} tables"] if spec.lut_qspec else []
        parts += ["scaled"] if spec.enable_per_channel_scale else []
        parts += [f"{spec.outlier_fraction:.2%} outliers"] if spec.outlier_fraction else []
        return " ".join(parts)
    parts = [dtype_name(spec.dtype)]
    if isinstance(per, PerBlockGranularity):
        parts.append(f"b{per.block_size}")
    elif isinstance(per, PerGroupedChannelGranularity):
        parts.append(f"g{per.group_size}")
    elif isinstance(per, PerTensorGranularity):
        parts.append("per tensor")
    parts += ["asymmetric"] if spec.qscheme is QuantizationScheme.ASYMMETRIC else []
    return " ".join(parts)
