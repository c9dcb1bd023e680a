"""SCHEMES: every way to store a weight, and which one a spec or a stored weight belongs to."""

from __future__ import annotations

from typing import Any

from graphopt.errors import ConfigError
from graphopt.schemes.base import Scheme, StoredWeight
from graphopt.schemes.palettize import Palettization
from graphopt.schemes.prune import Pruning
from graphopt.schemes.quantize import Quantization
from graphopt.specs.model import SpecModel

__all__ = ["SCHEMES", "scheme_of", "stored_from"]

SCHEMES: tuple[Scheme[Any, Any], ...] = (Palettization(), Quantization(), Pruning())


def scheme_of(spec: SpecModel) -> Scheme[Any, Any]:
    """The scheme of a spec.

    Raises:
        ConfigError: There is none.
    """
    for scheme in SCHEMES:
        if isinstance(spec, scheme.spec_type):
            return scheme
    known = [scheme.spec_type.__name__ for scheme in SCHEMES]
    raise ConfigError(f"{type(spec).__name__} is no spec of a weight; there are {known}")


def stored_from(state: dict[str, Any]) -> StoredWeight:
    """The stored weight that `StoredWeight.to_state` has written down.

    Raises:
        ConfigError: It is of no known kind.
    """
    for scheme in SCHEMES:
        if scheme.stored_type.kind == state["kind"]:
            stored: StoredWeight = scheme.stored_type.from_state(state)
            return stored
    raise ConfigError(f"no scheme stores weights as {state['kind']!r}")
