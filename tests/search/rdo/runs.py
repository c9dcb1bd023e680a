"""Runs of the whole pipeline on small nets."""

from __future__ import annotations

from functools import cache
from typing import Any

from search.rdo.nets import calibration, held_out, trained
from torch import Tensor, nn

from graphopt import rdo
from graphopt.rdo import optimize

QUICK = {"draws": 2, "rounding": {"steps": 40}}


EXAMPLE = (calibration()[0][:2],)


def run(config: dict[str, Any], **options: Any) -> rdo.Optimized:
    return optimize(
        trained(), EXAMPLE, calibration(), {**QUICK, **config}, progress=False, **options
    )


@cache
def plain() -> rdo.Optimized:
    return run({"target_bits": 5.0}, evaluate=right, evaluation_data=[held_out()[0]])


def right(model: nn.Module) -> Tensor:
    x, y = held_out()
    return 100.0 * (model(x).argmax(1) == y)
