"""Training with palettes: the prepared module gets trainable weights and palettizers."""

from __future__ import annotations

from torch import nn

from graphopt.config.palettization import KMeansPalettizerConfig, PATSchedule
from graphopt.errors import InputError
from graphopt.ir.captured_module import CapturedModule, holder_of
from graphopt.ir.decoded_tensor import settle
from graphopt.ir.program import Program, share_graph
from graphopt.passes import InsertPalettizers, RestoreTraining
from graphopt.passes.pass_manager import run_passes
from graphopt.prepared import QUANTIZERS, WeightPalettizer
from graphopt.prepared.state import parts_of, take_state
from graphopt.run.placing import device_of_graph
from graphopt.schemes.palettize import PalettizedWeight
from graphopt.specs import DKMTrainingSpec

__all__ = ["PaletteTraining"]


class PaletteTraining:
    """The training form of a prepared module and its schedule.

    Args:
        annotated: The program with the weights to start from.
        prepared: What `prepare` returned; it takes the training form in place, so that references
            to it and to its parameters stay good.
        palettes: Clusterings to start from.
        config: Where the schedules are.
        default: What a spec's default strategy stands for.
        device: Where soft palettes are computed; None is where the weights are.
    """

    def __init__(
        self,
        annotated: Program,
        prepared: CapturedModule,
        palettes: dict[str, PalettizedWeight],
        config: KMeansPalettizerConfig,
        default: DKMTrainingSpec | None,
        device: str | None = None,
    ) -> None:
        self.annotated = annotated
        self.prepared = prepared
        self.config = config
        self.steps = 0
        form = share_graph(annotated.graph_module)
        run_passes(form, [InsertPalettizers(palettes, default, device), RestoreTraining()])
        for name in palettes:
            holder, attribute = holder_of(annotated.graph_module, name)
            target, attribute = holder_of(prepared, name)
            held, exact = getattr(target, attribute), getattr(holder, attribute).detach()
            settle(held, exact.clone() if exact.device == held.device else exact.to(held.device))
        prepared.add_module(QUANTIZERS, getattr(form, QUANTIZERS).to(device_of_graph(prepared)))
        prepared.graph = form.graph
        self.follow()

    def follow(self) -> None:
        """Switch palettizers as the schedules say."""
        for palettizer in parts_of(self.prepared, WeightPalettizer):
            configured = self.config.schedule_at(palettizer.origin.path, "pat_schedule")
            schedule = configured or PATSchedule()
            palettizer.palettizing = self.steps >= schedule.enable_fake_palettize
            freeze = schedule.freeze_codes
            palettizer.frozen = freeze is not None and self.steps >= freeze

    def leave(self) -> None:
        """Palettize whatever the schedule says: so will the compressed program."""
        self.prepared.eval()
        for palettizer in parts_of(self.prepared, WeightPalettizer):
            palettizer.palettizing = True

    def fitted(self, model: nn.Module | None) -> tuple[Program, dict[str, PalettizedWeight]]:
        """The trained program, its weights still dense, and their palettes.

        Args:
            model: The prepared module, or a trained copy of it.
        """
        trained = self.prepared if model is None else model
        if not isinstance(trained, CapturedModule) or not parts_of(trained, WeightPalettizer):
            raise InputError(f"model must come from prepare(), got {type(trained).__name__}")
        program = self.annotated.copy()
        take_state(program.graph_module, trained)
        palettes = {}
        for palettizer in parts_of(trained, WeightPalettizer):
            holder, name = holder_of(program.graph_module, palettizer.origin.name)
            palettes[palettizer.origin.name] = palettizer.palettized(getattr(holder, name))
        return program, palettes
