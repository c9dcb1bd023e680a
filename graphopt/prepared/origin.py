"""Where a quantizer of a prepared graph belongs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["QUANTIZERS", "Origin"]

QUANTIZERS = "_quantizers"  # where a prepared graph holds them


@dataclass(frozen=True)
class Origin:
    """What a quantizer serves.

    Attributes:
        name: Name of the weight, or of the sharing group of activations.
        module: Name of the module whose op it belongs to.
        path: Config path that decided.
    """

    name: str = ""
    module: str = ""
    path: str = ""
