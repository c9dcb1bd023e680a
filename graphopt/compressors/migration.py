"""Migration of scales in a prepared module that people hold already."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.compressors.pipeline import PausedRun
from graphopt.ir.captured_module import CapturedModule, holder_of
from graphopt.ir.editor import Editor
from graphopt.passes import MigrateScales
from graphopt.passes.calibrate_activations import with_quantizers
from graphopt.prepared import WeightQuantizer
from graphopt.prepared.state import parts_of, take_state

__all__ = ["Calls", "migrate_prepared"]

_ELEMENTS = 1 << 26  # of inputs that are kept until a calibration ends


class Calls:
    """The inputs of a module's calls, while they are not too many.

    Attributes:
        inputs: Those of each call, by name.
    """

    def __init__(self, module: CapturedModule) -> None:
        self.inputs: list[dict[str, Any]] = []
        self._signature = inspect.signature(module.forward)
        self._room = _ELEMENTS

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember a call."""
        self._room -= sum(
            leaf.numel() for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        )
        if self._room >= 0:
            self.inputs.append(dict(self._signature.bind(*args, **kwargs).arguments))


def migrate_prepared(
    run: PausedRun, prepared: CapturedModule, data: Sequence[Any]
) -> PausedRun | None:
    """Run `MigrateScales` on what a prepared module was made of, and change the module accordingly.

    The module stays the same object, and so do its parameters; its ranges are to be observed anew.

    Args:
        run: The run that waits for its calibration.
        prepared: Its prepared module, changed in place.
        data: Inputs of one call each.

    Returns:
        The run with the migrated program; None where nothing was to be gained.
    """
    source = run.program.copy()
    take_state(source.graph_module, prepared)
    if not MigrateScales(data)(source.graph_module).modified:
        return None
    fresh = with_quantizers(copy.deepcopy(source.graph_module))
    known = {part.origin.name: part for part in parts_of(prepared, WeightQuantizer)}
    for part in parts_of(fresh, WeightQuantizer):
        if part.origin.name in known:
            part.observing = known[part.origin.name].observing
            part.rounding = known[part.origin.name].rounding
    parameters = dict(prepared.named_parameters(remove_duplicate=False))
    Editor(prepared).adopt(fresh)
    for path, value in list(prepared.named_parameters(remove_duplicate=False)):
        old = parameters.get(path)
        if old is not None and old.shape == value.shape:
            old.data = value.detach()
            holder, name = holder_of(prepared, path)
            assert isinstance(old, nn.Parameter)
            holder.register_parameter(name, old)
    prepared.recompile()
    return replace(run, program=source)
