"""BlockFit: the layers of a block in their compressed forms; and which blocks are worth rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphopt.search.rdo.adaptive_rounding import Rounded
from graphopt.search.rdo.allocation import Rates
from graphopt.search.rdo.config import RoundingOptions
from graphopt.search.rdo.layer_fit import LayerFit

__all__ = ["BlockFit", "fits_of", "sensitive_blocks"]


@dataclass(frozen=True)
class BlockFit:
    """One block in its compressed form.

    Attributes:
        number: Its place.
        layers: Name of each of its layers → its form.
        rounded: What adaptive rounding did, or None where it did not run.

    Examples:
        >>> config = graphopt.rdo.RDOConfig.from_dict({"target_bits": 8, "candidates": [4, 8]})
        >>> session = graphopt.rdo.Session.open(model, example, batches, config)
        >>> fits = session.fit(session.search(rate_weight=1e-9).choice)
        >>> all(isinstance(fit, BlockFit) for fit in fits), [list(fit.layers) for fit in fits]
        (True, [['0.weight'], ['2.weight']])
    """

    number: int
    layers: dict[str, LayerFit]
    rounded: Rounded | None = None


def fits_of(blocks: Sequence[BlockFit]) -> dict[str, LayerFit]:
    """Name of the layer → its form."""
    return {name: form for block in blocks for name, form in block.layers.items()}


def sensitive_blocks(
    blocks: Sequence[Sequence[str]],
    choice: Mapping[str, str],
    losses: Rates,
    options: RoundingOptions,
) -> list[int]:
    """The fewest blocks that hold a share of the loss, or all, or none, as the options say.

    Args:
        blocks: Names of the layers of each block.
        choice: Layer → candidate.
        losses: Layer → candidate → what it costs.
        options: Which blocks, and the share.

    Returns:
        Their numbers, increasing.
    """
    if options.blocks != "sensitive":
        return list(range(len(blocks))) if options.blocks == "all" else []
    sums = [sum(max(losses[name][choice[name]], 0.0) for name in own) for own in blocks]
    order = sorted(range(len(sums)), key=lambda number: -sums[number])
    wanted, taken = options.share * sum(sums), 0.0
    chosen = []
    for number in order:
        if taken >= wanted:
            break
        chosen.append(number)
        taken += sums[number]
    return sorted(chosen)
