"""KMeansPalettizer: the compressor class of data-free k-means palettization."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.export import ExportedProgram

from graphopt.api import convert_for
from graphopt.backends import load_backend
from graphopt.capture import capture
from graphopt.captured_module import CapturedModule
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.errors import InputError, StateError
from graphopt.pass_manager import run_passes
from graphopt.passes import (
    AnnotatePalettization,
    FakePalettize,
    FoldBatchNorm,
    PalettizeWeights,
    RemoveUnused,
    cluster_annotated,
)
from graphopt.program import CompressedProgram, Program
from graphopt.schemes.palettize import PalettizedWeight
from graphopt.specs import ExportBackend
from graphopt.table import CompressionTable

__all__ = ["KMeansPalettizer"]

_log = logging.getLogger(__name__)


class KMeansPalettizer:
    """Replace weights by tables of centroids and indices, without data.

    >>> palettizer = KMeansPalettizer(model, KMeansPalettizerConfig.presets.w4())
    >>> prepared = palettizer.prepare(example_inputs)     # computes with the palettes
    >>> finalized = palettizer.finalize(backend=ExportBackend.CoreAI)

    Args:
        model: A module, an `ExportedProgram`, or a `Program`; it is never changed.
        config: What becomes of which weight; 4 bits per tensor everywhere by default.
    """

    def __init__(
        self,
        model: nn.Module | ExportedProgram | Program,
        config: KMeansPalettizerConfig | None = None,
    ) -> None:
        if not isinstance(model, nn.Module | ExportedProgram | Program):
            raise InputError(
                f"model must be a module, an ExportedProgram or a Program, got {type(model).__name__}"
            )
        self._model = model
        self._config = KMeansPalettizerConfig() if config is None else config
        self._annotated: Program | None = None
        self._palettes: dict[str, PalettizedWeight] = {}
        self._summary = CompressionTable(())

    def prepare(
        self,
        example_inputs: tuple[Any, ...] | Tensor | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        dynamic_shapes: Any = "auto",
        fold_batch_norm: bool = False,
        on_unmatched: Literal["error", "warn"] = "error",
        num_workers: int = 1,
        progress: bool | None = None,
        seed: int = 0,
    ) -> CapturedModule:
        """Capture the model and cluster its weights.

        Args:
            example_inputs: Inputs of one call.
            example_kwargs: Keyword inputs of that call.
            dynamic_shapes: As for `graphopt.capture`.
            fold_batch_norm: Fold batch norms into the convolutions before them first. Artifacts
                get smaller and faster by one op per norm, but the norms' names leave the state
                dict, and one table has to serve channels of different gains.
            on_unmatched: Whether a config key that matches no module, op or state raises or warns.
            num_workers: Accepted for compatibility; clustering uses torch's threads.
            progress: Show a bar; None shows it on a terminal.
            seed: Seed of vector tables.

        Returns:
            A module with the model's signature and state-dict names that computes with the
            palettized weights. It shares nothing with the model.

        Raises:
            CaptureError: The model cannot be exported.
            ConfigError: A config key matches nothing.
            CompressionError: A weight contains NaN or Inf.
            StateError: `prepare` was called before.
        """
        if self._annotated is not None:
            raise StateError("prepare() was called before; make a new KMeansPalettizer")
        if num_workers != 1:
            _log.info("num_workers has no effect: clustering uses torch's threads")
        program = self._model
        if not isinstance(program, Program):
            program = capture(program, example_inputs, example_kwargs, dynamic_shapes)
        elif example_inputs is not None or example_kwargs:
            args = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs or ()
            program = program.with_example(tuple(args), dict(example_kwargs or {}))
        annotated = program.copy()
        gm = annotated.graph_module
        if fold_batch_norm:
            run_passes(gm, [FoldBatchNorm(), RemoveUnused()])
        run_passes(gm, [AnnotatePalettization(self._config, on_unmatched)])
        self._palettes = cluster_annotated(gm, progress=progress, seed=seed)
        prepared = annotated.copy().graph_module
        run_passes(prepared, [FakePalettize(self._palettes)])
        self._annotated = annotated
        self._summary = prepared.meta["graphopt.table"]
        _log.info(
            "palettized %d of %d tensors to %.3f bits per weight",
            len(self._summary.palettized), len(self._summary), self._summary.bits_per_weight,
        )  # fmt: skip
        for row in self._summary.skipped:
            _log.info("left %s as it is: %s", row.name, row.detail)
        return copy.deepcopy(prepared)

    def finalize(
        self,
        model: nn.Module | None = None,
        backend: ExportBackend | str = ExportBackend.CoreAI,
    ) -> CapturedModule:
        """Turn the palettes into indices, tables and lookup ops.

        Args:
            model: Accepted for compatibility: None, or what `prepare` returned.
            backend: Whose ops the module holds; `ExportBackend.Torch` keeps our neutral ones.

        Returns:
            A callable module, ready for `torch.export.export`.

        Raises:
            StateError: `prepare` was not called.
            LoweringError: The backend cannot hold a palette; the message says which and why.
        """
        del model
        return convert_for(self.program(), backend)

    def program(self) -> CompressedProgram:
        """The compressed program in our neutral vocabulary.

        Raises:
            StateError: `prepare` was not called.
        """
        from graphopt.api import lower_by_suffix

        if self._annotated is None:
            raise StateError("call prepare(example_inputs) first")
        converted = self._annotated.copy()
        run_passes(converted.graph_module, [PalettizeWeights(self._palettes)])
        return CompressedProgram(
            # the original weights are gone by now; what is copied here is small
            graph_module=copy.deepcopy(converted.graph_module),
            example_args=converted.example_args,
            example_kwargs=converted.example_kwargs,
            provenance=converted.provenance,
            lower_with=lower_by_suffix,
        )

    def summary(self, backend: ExportBackend | str | None = None) -> CompressionTable:
        """One row per candidate tensor: what was done, or why not.

        Args:
            backend: Count sizes as this target stores them (Core AI keeps 3-bit codes as 4-bit
                ones); None counts the codes' own width.

        Raises:
            StateError: `prepare` was not called.
        """
        if self._annotated is None:
            raise StateError("call prepare(example_inputs) first")
        if backend is None:
            return self._summary
        capabilities = load_backend(backend).capabilities
        rows = []
        for row in self._summary:
            width = None if row.n_bits is None else capabilities.stored_bits(row.n_bits)
            if width is None or width == row.n_bits:
                rows.append(row)
                continue
            bits = self._palettes[row.name].stored_bits(width)
            note = f"{row.note}; " if row.note else ""
            rows.append(replace(row, stored_bits=bits, note=f"{note}stored as {width}-bit codes"))
        return CompressionTable(tuple(rows), self._summary.warnings)
