"""Weights fitted by error feedback in a prepared module that people hold already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.compressors.pipeline import PausedRun
from graphopt.ir.captured_module import CapturedModule
from graphopt.passes import FitIntegers, FoldBatchNorm
from graphopt.prepared.conversion import scales_of
from graphopt.prepared.findings import hold_stored, keep_findings
from graphopt.prepared.state import take_state

__all__ = ["fit_prepared"]


def fit_prepared(
    run: PausedRun, prepared: CapturedModule, data: Sequence[Any], progress: bool | None
) -> None:
    """Run `FitIntegers` on what a prepared module was made of; its quantizers give what was found.

    Args:
        run: The run that waits for its calibration.
        prepared: Its prepared module, whose ranges are known; biases are corrected in place.
        data: Inputs of one call each.
        progress: Show a bar; None shows it on a terminal.
    """
    source = run.program.copy().graph_module
    take_state(source, prepared)
    keep_findings(source, scales=scales_of(prepared, "skip"))
    FitIntegers(data, progress=progress)(source)
    held = dict(prepared.named_parameters())
    for path, value in source.named_parameters():
        if path in held and held[path] is not value:
            with torch.no_grad():
                held[path].copy_(value)
    FoldBatchNorm()(source)
    hold_stored(prepared, source)
