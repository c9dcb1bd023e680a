"""MagnitudePruner: the compressor class of pruning, at once or along a schedule in training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.export import ExportedProgram
from typing_extensions import override

from graphopt.compressors.base import Compressor
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.compressors.flow import joint_pipeline
from graphopt.compressors.options import CompressOptions
from graphopt.config.joint import JointConfig
from graphopt.config.pruning import MagnitudePrunerConfig
from graphopt.errors import CompressionError
from graphopt.ir.captured_module import CapturedModule, holder_of
from graphopt.ir.program import Program
from graphopt.passes import InsertPruners, RestoreTraining
from graphopt.passes.pass_manager import run_passes
from graphopt.prepared import WeightPruner
from graphopt.prepared.state import parts_of, take_state

__all__ = ["MagnitudePruner"]

_log = logging.getLogger(__name__)


class MagnitudePruner(Compressor):
    """Set the smallest elements, blocks or channels of weights to zero, and store the rest.

    >>> pruner = MagnitudePruner(model)
    >>> prepared = pruner.prepare(example)  # computes with the zeros of the schedule's start
    >>> optimizer = torch.optim.Adam(prepared.parameters())
    >>> with pruner.training_mode():  # optional
    ...     for x in batches:
    ...         optimizer.zero_grad()
    ...         (prepared(x) - model(x).detach()).square().mean().backward()
    ...         _ = optimizer.step(), pruner.step()
    >>> finalized = pruner.finalize(backend=graphopt.ExportBackend.Torch)

    Args:
        model: A module, an `ExportedProgram`, or a `Program`; it is never changed.
        config: What becomes of which weight; half of every weight by default.
    """

    compresses: ClassVar[str] = "weights"

    def __init__(
        self,
        model: nn.Module | ExportedProgram | Program,
        config: MagnitudePrunerConfig | None = None,
    ) -> None:
        super().__init__(model)
        self._config = MagnitudePrunerConfig() if config is None else config

    @override
    def prepare(
        self,
        example_inputs: tuple[Any, ...] | Tensor | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        on_unmatched: Literal["error", "warn"] = "error",
        dynamic_shapes: Any = "auto",
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> CapturedModule:
        """Capture the model and mask its weights.

        Args:
            example_inputs: Inputs of one call.
            example_kwargs: Keyword inputs of that call.
            on_unmatched: Whether a config key that matches no module, op or state raises or warns.
            dynamic_shapes: As for `graphopt.capture`, where the model is no program yet.
            state_dict: State dict of a model that was prepared with the same config: weights, masks
                and counted steps are taken from it, and schedules go on from there.

        Returns:
            A module with the model's signature and state-dict names that computes with the zeros
            that each schedule begins with, or all of them where there is none. It shares nothing
            with the model; batch norms and dropouts train.

        Raises:
            CaptureError: The model cannot be exported.
            ConfigError: A config key matches nothing.
            CompressionError: A weight contains NaN or Inf.
            InputError: `state_dict` does not fit.
            StateError: `prepare` was called before.
        """
        self._refuse_second_prepare()
        how = CompressOptions(on_unmatched=on_unmatched)
        pipeline = joint_pipeline("prune", JointConfig(pruning=self._config), options=how)
        run = self._pause(pipeline, "prune-weights", example_inputs, example_kwargs, dynamic_shapes)
        prepared = copy.deepcopy(run.program.graph_module)
        run_passes(prepared, [InsertPruners(), RestoreTraining()])
        prepared.eval()
        if state_dict is None:
            self._follow(prepared)
        else:
            self._load(prepared, state_dict)
        self._run, self._prepared = run, prepared
        _log.info("%d weights to prune", len(parts_of(prepared, WeightPruner)))
        return prepared

    def step(self) -> None:
        """Count a training step: masks follow the schedules, from the weights as they are now.

        Raises:
            StateError: `prepare` was not called.
        """
        prepared = self._ready()
        for pruner in parts_of(prepared, WeightPruner):
            pruner.count_step()
        self._follow(prepared)

    @contextmanager
    def training_mode(self, model: nn.Module | None = None) -> Iterator[CapturedModule]:
        """Let batch norms and dropouts of the prepared module behave as in training.

        Args:
            model: Accepted for compatibility: None, or what `prepare` returned.

        Raises:
            StateError: `prepare` was not called, or the model drops something in training for which
                the graph has no place.
        """
        del model
        prepared = self._start_training()
        try:
            yield prepared
        finally:
            prepared.eval()

    @override
    def program(self, model: nn.Module | None = None) -> CompressedProgram:
        """The pruned program in our neutral vocabulary.

        A schedule that has not run to its end is cut short: weights get their final sparsity.

        Raises:
            InputError: `model` is something else than what `prepare` returned.
            StateError: `prepare` was not called.
        """
        run, prepared = self._waiting(), self._from_prepare(model, WeightPruner)
        source = run.program.copy()
        take_state(source.graph_module, prepared)
        masks = {
            pruner.origin.name: pruner.mask
            for pruner in parts_of(prepared, WeightPruner)
            if pruner.has(pruner.spec.final_sparsity)
        }
        return run.finish(source, masks=masks)

    def _follow(self, prepared: CapturedModule) -> None:
        for pruner in parts_of(prepared, WeightPruner):
            target = pruner.spec.final_sparsity
            schedule = self._config.schedule_at(pruner.origin.path, "sparsity_schedule")
            share = (
                target
                if schedule is None
                else schedule.compute_sparsity(pruner.steps, target, pruner.sparsity)
            )
            holder, name = holder_of(prepared, pruner.origin.name)
            try:
                pruner.update(getattr(holder, name).detach(), share)
            except CompressionError as error:
                raise CompressionError(f"{pruner.origin.name}: {error}") from None
