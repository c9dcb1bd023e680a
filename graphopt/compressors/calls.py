"""The calls of a calibration, and those of them that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.compressors.options import CompressOptions
from graphopt.errors import CalibrationError
from graphopt.fitting.sensitivity import LossFn
from graphopt.fitting.tuning import held_out_of
from graphopt.run.calibration_data import inputs_of_pairs

__all__ = ["CalibrationCalls"]


@dataclass(frozen=True)
class CalibrationCalls:
    """Calls of a calibration.

    Attributes:
        fitted: Those that weights are fitted to and that are tuned on.
        held_out: Those that decide when tuning was best: ranges alone are theirs, too.
    """

    fitted: list[Any]
    held_out: list[Any]

    @property
    def every(self) -> list[Any]:
        """All of them."""
        return [*self.fitted, *self.held_out]

    def inputs(self, loss_fn: LossFn | None) -> CalibrationCalls:
        """Without the targets that a loss needs."""
        if loss_fn is None:
            return self
        return CalibrationCalls(*map(inputs_of_pairs, (self.fitted, self.held_out)))

    @classmethod
    def of(cls, data: Sequence[Any], how: CompressOptions) -> CalibrationCalls:
        """Hold calls out where there is tuning, as many as `held_out_of` says.

        Raises:
            CalibrationError: There is tuning and no call.
        """
        if how.tune_steps < 1:
            return cls(list(data), [])
        if not data:
            raise CalibrationError(
                f"tune_steps={how.tune_steps} needs calibration data, to tune on and to hold out"
            )
        count = held_out_of(len(data))
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(how.seed))
        held = set(order[:count].tolist())
        return cls(
            [call for number, call in enumerate(data) if number not in held],
            [call for number, call in enumerate(data) if number in held],
        )
