"""What a layer may become where nobody says it: what the engine has, as far as the target holds it."""

from __future__ import annotations

from graphopt.backends.base import Backend
from graphopt.search.mixed_precision.candidates import Candidate, as_candidates
from graphopt.search.mixed_precision.layers import refusals_of

__all__ = ["offered"]

# palettes, palettes per 16 channels, vectors, integers: from 1 bit per weight to 8
_ALL = ("1", "2", "3", "4", "6", "8", "4 g16", "8 v4", "6 v2", "int4 b32", "int8")


def offered(backend: Backend) -> tuple[Candidate, ...]:
    """The candidates that a target can hold.

    Args:
        backend: The target.
    """
    known = as_candidates(_ALL)
    refused = refusals_of(known, str(backend.target))
    return tuple(candidate for candidate in known if candidate.name not in refused)
