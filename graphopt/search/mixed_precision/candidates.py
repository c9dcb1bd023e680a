"""Candidates: the named compression specs among which each layer chooses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from graphopt.config.base import read_yaml
from graphopt.errors import ConfigError
from graphopt.schemes import registry
from graphopt.schemes.registry import scheme_of
from graphopt.specs import PerTensorGranularity, QuantizationSpec
from graphopt.specs.model import SpecModel

__all__ = ["KEEP", "Candidate", "CandidateLike", "as_candidates", "read_candidates", "spec_name"]

WeightSpec = SpecModel


@dataclass(frozen=True)
class Candidate:
    """What one layer could become.

    Attributes:
        name: Name in tables, recipes and files.
        weight: Spec of the weight; None leaves it uncompressed.
        activation: Spec of the op's data input; None leaves it in float.

    Examples:
        >>> spec = graphopt.palettization.PalettizationSpec(n_bits=2)
        >>> Candidate("2-bit", spec).is_kept, Candidate("keep").is_kept
        (False, True)
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
        plain: dict[str, Any] = {}
        if self.weight is not None:
            plain[scheme_of(self.weight).kind] = _dumped(self.weight)
        if self.activation is not None:
            plain["activation"] = _dumped(self.activation)
        return plain

    @classmethod
    def from_dict(cls, name: str, data: Mapping[str, Any]) -> Candidate:
        """Read `{"palettize": {...}}`, `{"quantize": {...}}`, each with "activation", or `{}`.

        Raises:
            ConfigError: A key is unknown, a value is wrong, or both kinds are given.
        """
        schemes = {scheme.kind: scheme for scheme in registry.SCHEMES if scheme.searched}
        unknown = set(data) - {*schemes, "activation"}
        kinds = [kind for kind in schemes if kind in data]
        if unknown or len(kinds) > 1:
            raise ConfigError(
                f"candidate {name!r}: give one of {' and '.join(map(repr, schemes))}, and"
                f" 'activation' if wanted; got {sorted(map(str, data))}"
            )
        try:
            weight: WeightSpec | None = None
            for kind in kinds:
                weight = schemes[kind].spec_type.model_validate(data[kind])
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
CandidateLike = int | str | SpecModel | Candidate | Mapping[str, Any] | None


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

    Examples:
        >>> [candidate.name for candidate in as_candidates([2, "int8", "keep"])]
        ['2-bit', 'int8', 'keep']
    """
    named: Iterable[tuple[str | None, CandidateLike]]
    if isinstance(given, Mapping):
        named = given.items()
    elif isinstance(given, str) or not isinstance(given, Sequence):
        raise ConfigError(f"candidates must be a sequence or a mapping, got {given!r}")
    else:
        named = ((None, spec) for spec in given)
    candidates = [_candidate(name, spec) for name, spec in named]
    if not candidates:
        raise ConfigError("there are no candidates")
    names = [candidate.name for candidate in candidates]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"several candidates are called {twice}; name them by a mapping")
    return tuple(candidates)


def read_candidates(path: Path) -> tuple[tuple[Candidate, ...], dict[str, tuple[Candidate, ...]]]:
    """Read a YAML file with `candidates` and, if wanted, `layers` (pattern → candidates).

    Raises:
        ConfigError: The file is no such mapping.
    """
    data = read_yaml(path, "candidates")
    if not isinstance(data, dict):
        raise ConfigError(f"{path.name}: expected a mapping, got {type(data).__name__}")
    unknown = sorted(map(str, set(data) - {"candidates", "layers"}))
    if unknown or "candidates" not in data:
        raise ConfigError(
            f"{path.name}: needs 'candidates' and may have 'layers', got {sorted(map(str, data))}"
        )
    layers = data.get("layers") or {}
    if not isinstance(layers, dict):
        raise ConfigError(f"{path.name}: layers: expected a mapping, got {layers!r}")
    return as_candidates(data["candidates"]), {
        pattern: as_candidates(group) for pattern, group in layers.items()
    }


def _candidate(name: str | None, given: CandidateLike) -> Candidate:
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"the name of a candidate is a text, got {name!r}")
    if isinstance(given, Candidate):
        return given if name is None else Candidate(name, given.weight, given.activation)
    if given is None or given == "keep":
        return Candidate(name or KEEP.name)
    if isinstance(given, Mapping):
        if name is None:
            raise ConfigError(
                f"a candidate given as a mapping needs a name, as in {{'mine': {dict(given)}}} in"
                " place of the list"
            )
        return Candidate.from_dict(name, given)
    if isinstance(given, SpecModel):
        return Candidate(name or spec_name(given), given)
    weight, activation = _parsed(str(given).strip())
    return Candidate(name or _joined(weight, activation), weight, activation)


def _joined(weight: WeightSpec, activation: QuantizationSpec | None) -> str:
    text = spec_name(weight)
    return text if activation is None else f"{text}, {spec_name(activation)} inputs"


def _parsed(text: str) -> tuple[WeightSpec, QuantizationSpec | None]:
    try:
        for scheme in registry.SCHEMES:
            parsed = scheme.parse(text)
            if parsed is not None:
                return parsed
    except (ValidationError, ValueError) as error:
        raise ConfigError(f"candidate {text!r}: {error}") from None
    raise ConfigError(
        f"candidate {text!r} is not understood; write e.g. 4, '4 g16', '8 v4', 'int8', 'int4 b32',"
        " 'int8 a8' or 'keep'"
    )


def spec_name(spec: WeightSpec) -> str:
    """A short name of a spec, such as "4-bit", "4-bit g16" or "int8"."""
    return scheme_of(spec).name_of(spec)
