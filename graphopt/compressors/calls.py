"""The calls of a calibration, and those of them that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.compressors.options import CompressOptions
from graphopt.errors import CalibrationError
from graphopt.fitting.sensitivity import LossFn
from graphopt.fitting.tuning import FEW, held_out_of
from graphopt.run.calibration_data import inputs_of_pairs

__all__ = ["CalibrationCalls"]


@dataclass(frozen=True)
class CalibrationCalls:
    """Calls of a calibration.

    Attributes:
        every: All of them, in their order.
        held: Places of those that decide when tuning was best.
    """

    every: list[Any]
    held: frozenset[int] = frozenset()

    @property
    def learned(self) -> list[Any]:
        """Those that are tuned on."""
        return [call for place, call in enumerate(self.every) if place not in self.held]

    @property
    def held_out(self) -> list[Any]:
        """Those that decide when tuning was best."""
        return [call for place, call in enumerate(self.every) if place in self.held]

    @property
    def fitted(self) -> list[Any]:
        """Those that weights are fitted to: all where they are few, else those that are tuned on.

        Few calls are dear, and a fit that has seen what decides makes it harder for tuning to count. Where
        tuning does not, the program is then the one that there is without it.
        """
        return self.every if len(self.every) < FEW else self.learned

    def inputs(self, loss_fn: LossFn | None) -> CalibrationCalls:
        """Without the targets that a loss needs."""
        if loss_fn is None:
            return self
        return CalibrationCalls(inputs_of_pairs(self.every), self.held)

    @classmethod
    def of(cls, data: Sequence[Any], how: CompressOptions) -> CalibrationCalls:
        """Hold calls out where there is tuning, as many as `held_out_of` says.

        Raises:
            CalibrationError: There is tuning and no call.
        """
        if how.tune_steps < 1:
            return cls(list(data))
        if not data:
            raise CalibrationError(
                f"tune_steps={how.tune_steps} needs calibration data, to tune on and to hold out"
            )
        count = held_out_of(len(data))
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(how.seed))
        return cls(list(data), frozenset(order[:count].tolist()))
