"""Session: one model under one config, and every stage of its optimisation as a method."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from graphopt.analysis.value_facts import is_float
from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.compressors.pipeline import PausedRun
from graphopt.errors import CompressionError, ConfigError
from graphopt.exclusive import exclusively
from graphopt.fitting.evidence import Resources
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.progress import track
from graphopt.run.batches import Batch
from graphopt.run.calibration_data import data_list, read_calls
from graphopt.schemes.base import StoredWeight
from graphopt.search.mixed_precision.analysis import analyze
from graphopt.search.mixed_precision.candidates import KEEP, Candidate
from graphopt.search.mixed_precision.layers import (
    Layer,
    find_layers,
    refuse_unsupported,
    uses_of,
    weights_of,
)
from graphopt.search.mixed_precision.sensitivity_table import SensitivityTable
from graphopt.search.mixed_precision.sizes import SizeModel
from graphopt.search.rdo.activations import refuse_hidden, with_rounded_activations
from graphopt.search.rdo.adaptive_rounding import Rounded, round_block
from graphopt.search.rdo.allocation import Rates
from graphopt.search.rdo.block_fit import BlockFit, fits_of, sensitive_blocks
from graphopt.search.rdo.blockwise_run import BlockwiseRun, GraphBlock, partners_of, run_from_exact
from graphopt.search.rdo.config import RDOConfig
from graphopt.search.rdo.curvature import Curvature, GradientOptions
from graphopt.search.rdo.flow import pipeline_of
from graphopt.search.rdo.graph_layers import (
    GraphLayer,
    find_layer_blocks,
    layers_by_name,
    layers_by_node,
)
from graphopt.search.rdo.layer_fit import LayerFit, LooseLayer, fit_layer
from graphopt.search.rdo.search import Costs, search_block

__all__ = ["BlockFit", "Costs", "Session", "fits_of"]

_log = logging.getLogger(__name__)
_SEEDS = 1_000_003


@dataclass(frozen=True)
class Session:
    """One model under one config.

    >>> config = graphopt.rdo.RDOConfig.from_dict({"target_bits": 8, "candidates": [4, 8]})
    >>> session = Session.open(model, example, batches, config)
    >>> costs = session.search(rate_weight=1e-9)
    >>> fits = session.fit(costs.choice)
    >>> program = session.program(fits)

    Attributes:
        run: The run of the pipeline, which waits for the forms of the layers.
        layers: Its layers with their candidates and sizes.
        candidates: Candidates by name.
        batches: Calibration inputs.
        config: Options.
        sizes: Prices.
        work: The program with rounded activations, if any; every block-wise run has a copy.
        blocks: Names of the layers of each block.
        curvature: Gradients of the exact program.
        resources: What values of layers may take in memory, and where the others go.
    """

    run: PausedRun
    layers: tuple[Layer, ...]
    candidates: dict[str, Candidate]
    batches: list[Batch]
    config: RDOConfig
    sizes: SizeModel
    work: Program
    blocks: tuple[tuple[str, ...], ...]
    curvature: Curvature
    resources: Resources

    @classmethod
    @exclusively
    def open(
        cls,
        model: nn.Module | ExportedProgram | Program | str | Path,
        example_inputs: tuple[Any, ...] | Tensor | None,
        data: Iterable[Any],
        config: RDOConfig,
        *,
        example_kwargs: Mapping[str, Any] | None = None,
        progress: bool | None = None,
        resources: Resources | None = None,
    ) -> Session:
        """Capture a model, cut it into blocks and measure what the loss feels at their outputs.

        Args:
            model: A module, an exported program, a `Program` or a .pt2 file; it is never changed.
            example_inputs: Inputs of one call.
            data: Calibration inputs of one call each, unlabelled, samples along the first dimension:
                a tensor, a tuple or list of positional ones, or a dict of keyword ones. A call is
                what one step of adaptive rounding sees.
            config: Options.
            example_kwargs: Keyword inputs of the example call.
            progress: Show bars; None shows them on a terminal.
            resources: Its `activation_memory` and `work_dir` hold for every pass over the blocks.

        Raises:
            CaptureError: The model cannot be exported.
            ConfigError: A pattern of `layer_candidates` matches nothing, a candidate asks for
                activations, or norms that are not folded stand behind layers of rounded ones.
            InputError: There are no data, they do not fit the model, or it has no weight to choose
                for.
            LoweringError: The backend cannot hold a candidate.
            CalibrationError: Activations have no usable range.
        """
        calls = data_list(data) or ()
        general, special = config.all_candidates()
        for candidate in (*general, *itertools.chain.from_iterable(special.values())):
            if candidate.activation is not None:
                raise ConfigError(
                    f"candidate {candidate.name!r} has activations; set `activations` for all layers"
                )
        pipeline = pipeline_of(config, {KEEP.name: KEEP})
        first = next(name for name in pipeline.names if name.startswith("annotate-"))
        run = pipeline.pause(first, model, example_inputs, example_kwargs)
        exact = run.program
        batches = list(read_calls(exact.graph_module, calls))
        weights = weights_of(exact.graph_module)
        kept = weights[0].tensor.dtype if weights else torch.float32
        sizes = SizeModel.of(config.backend, kept, None)
        layers, candidates = find_layers(exact.graph_module, general, special, sizes)
        if sizes.backend is not None:
            refuse_unsupported(tuple(candidates.values()), sizes.backend)
        work = exact.copy()
        if config.activations is not None:
            work = with_rounded_activations(exact, batches, config.activations, config.backend)
            refuse_hidden(layers, work)
        partners = partners_of(work.graph_module, exact.graph_module)
        by_node = layers_by_node(work.graph_module, layers, config)
        blocks = find_layer_blocks(work.graph_module, by_node, partners, config)
        ends = [[partners[node] for node in block.outputs if is_float(node)] for block in blocks]
        uses = uses_of(exact.graph_module, [layer.name for layer in layers])
        curvature = Curvature(
            exact.graph_module,
            batches,
            ends,
            list(uses.values()),
            GradientOptions(
                metric=config.metric,
                draws=config.draws,
                seed=config.seed,
                memory=config.gradient_memory,
                progress=progress,
            ),
        )
        named = tuple(
            tuple(dict.fromkeys(by_node[node].name for node in block.targets)) for block in blocks
        )
        known = (run, tuple(layers), candidates, batches, config, sizes, work, named, curvature)
        return cls(*known, resources or Resources())

    @property
    def exact(self) -> Program:
        """The exact program, batch norms folded if the config says so."""
        return self.run.program

    @property
    def weights(self) -> int:
        """Number of weights in all layers."""
        return sum(layer.numel for layer in self.layers)

    # --- stages ---------------------------------------------------------------------------------
    def sensitivities(
        self, path: str | Path | None = None, *, resume: bool = True, progress: bool | None = None
    ) -> SensitivityTable:
        """Predicted losses of all candidates, rounded to the nearest (`graphopt.mixed_precision`).

        Args:
            path: File that grows with every batch, or None.
            resume: Go on with an existing file.
            progress: Show bars; None shows them on a terminal.
        """
        general, special = self.config.all_candidates()
        return analyze(
            self.exact,
            None,
            general,
            self.batches_as_data(),
            self.config.metric,
            mode="fast",
            backend=self.config.backend,
            layer_candidates=dict(special),
            draws=self.config.draws,
            path=path,
            resume=resume,
            float_dtype=self.sizes.float_dtype,
            seed=self.config.seed,
            progress=progress,
        )

    def batches_as_data(self) -> list[Any]:
        """Calibration inputs as callers give them."""
        return [kwargs if kwargs else args for args, kwargs in self.batches]

    def search(
        self, rate_weight: float, *, progress: bool | None = None, executor: Any = None
    ) -> Costs:
        """Rate-distortion optimisation of one block after the other (`graphopt.rdo.search`).

        Args:
            rate_weight: λ, loss per bit.
            progress: Show a bar; None shows it on a terminal.
            executor: As in `RunOptions`.
        """
        costs, moves = Costs(), 0

        def work() -> Iterator[None]:
            nonlocal moves
            run = self._blockwise_run()
            for block in run.blocks():
                for block_costs in search_block(
                    run, block, self.candidates, self.config, rate_weight, executor
                ):
                    if block_costs is None:
                        yield None
                        continue
                    costs.losses.update(block_costs.losses)
                    costs.bits.update(block_costs.bits)
                    costs.choice.update(block_costs.choice)
                    moves += block_costs.moves

        for _ in track(work(), "searching blocks", len(self.layers), enabled=progress):
            pass
        order = [layer.name for layer in self.layers]
        return Costs(
            {name: costs.losses[name] for name in order},
            {name: costs.bits[name] for name in order},
            {name: costs.choice[name] for name in order},
            moves,
            rate_weight,
        )

    def fit(
        self,
        choice: Mapping[str, str],
        *,
        rate_weight: float = 0.0,
        rounded: Sequence[int] = (),
        known: Mapping[int, BlockFit] | None = None,
        save: Callable[[BlockFit], None] | None = None,
        progress: bool | None = None,
    ) -> list[BlockFit]:
        """Hessian-guided calibration of every layer, and adaptive rounding of some blocks.

        Args:
            choice: Layer → candidate.
            rate_weight: λ, for rate "entropy".
            rounded: Numbers of the blocks to round (`graphopt.search.rdo.adaptive_rounding`).
            known: Blocks that are done already.
            save: Called with every finished block.
            progress: Show a bar; None shows it on a terminal.

        Raises:
            ConfigError: A layer has no such candidate.
        """
        for layer in self.layers:
            if choice.get(layer.name) not in layer.candidates:
                raise ConfigError(
                    f"choice[{layer.name!r}]: {choice.get(layer.name)!r} is none of its candidates"
                    f" {list(layer.candidates)}"
                )
        fits: list[BlockFit] = []
        run = self._blockwise_run()

        def work() -> Iterator[None]:
            for block in run.blocks():
                if known is not None and block.number in known:
                    done = known[block.number]
                    for layer in block.layers:
                        run.apply(layer, done.layers[layer.name])
                else:
                    done = BlockFit(block.number, {})
                    wanted = block.number in rounded
                    for result in self._fit_block(run, block, choice, rate_weight, wanted):
                        if result is None:
                            yield None
                        else:
                            done = result
                    if save is not None:
                        save(done)
                fits.append(done)

        missing = [n for n in rounded if known is None or n not in known]
        total = len(self.layers) + len(missing) * self.config.rounding.steps
        for _ in track(work(), "fitting blocks", total, enabled=progress):
            pass
        return fits

    def _fit_block(
        self,
        run: BlockwiseRun,
        block: GraphBlock,
        choice: Mapping[str, str],
        rate_weight: float,
        rounding: bool,
    ) -> Iterator[BlockFit | None]:
        fits: list[tuple[GraphLayer, LayerFit, Tensor]] = []
        for layer in block.layers:
            target = run.target_of(layer, block)
            candidate = self.candidates[choice[layer.name]]
            importance = run.importance(layer)
            try:
                fitted = fit_layer(
                    LooseLayer.of(layer), candidate, target, self.config, rate_weight, importance
                )
            except CompressionError as error:
                raise CompressionError(f"{layer.name}: {error}") from None
            run.apply(layer, fitted)
            aim = layer.weight.tensor.detach() if target is None else target.weight
            fits.append((layer, fitted, aim))
            yield None
        forms = {layer.name: fitted for layer, fitted, _ in fits}
        outcome: Rounded | None = None
        if rounding:
            seed = self.config.seed * _SEEDS + block.number
            options = self.config.rounding
            for step in round_block(run, block, fits, self.candidates, options, seed=seed):
                outcome = step
                yield None
            assert outcome is not None
            forms |= outcome.fitted
        yield BlockFit(block.number, forms, outcome)

    def sensitive_blocks(self, choice: Mapping[str, str], losses: Rates) -> list[int]:
        """The fewest blocks that hold the config's share of the loss, or all, or none."""
        return sensitive_blocks(self.blocks, choice, losses, self.config.rounding)

    def program(
        self, fits: Sequence[BlockFit], *, progress: bool | None = None
    ) -> CompressedProgram:
        """The compressed program, with activations quantized if the config says so.

        Args:
            fits: What `fit` returned.
            progress: Show a bar; None shows it on a terminal.
        """
        forms = fits_of(fits)
        made = self.exact.copy()
        edit = Editor(made.graph_module)
        for name, layer in layers_by_name(made.graph_module, self.layers, self.config).items():
            bias = forms[name].bias
            if bias is not None and layer.bias is not None:
                edit.set_value(layer.bias, bias)
        choice = {name: self.candidates[form.candidate] for name, form in forms.items()}
        stored = {name: form.stored for name, form in forms.items() if form.stored is not None}
        return self.converted(choice, made, stored, progress=progress)

    def converted(
        self,
        choice: Mapping[str, Candidate],
        source: Program | None = None,
        stored: Mapping[str, StoredWeight] | None = None,
        *,
        progress: bool | None = None,
    ) -> CompressedProgram:
        """The program whose layers have taken the forms of candidates; activations as the config says.

        Args:
            choice: Name of the layer → its candidate.
            source: What goes on, `exact` with other biases; it is rewritten. None is a copy of `exact`.
            stored: Name of the layer → its form; layers without one are rounded as their specs say.
            progress: Show a bar; None shows it on a terminal.

        Raises:
            CalibrationError: Activations have no usable range.
        """
        data = None if self.config.activations is None else self.batches_as_data()
        pipeline = pipeline_of(self.config, choice, data, progress=progress)
        return self.run.followed_by(pipeline).finish(source, stored=stored or {})

    def _blockwise_run(self) -> BlockwiseRun:
        """A pass over the blocks that begins with exact weights."""
        known = (self.layers, self.batches, self.curvature, self.config)
        return run_from_exact((self.exact, self.work), *known, self.resources.store())
