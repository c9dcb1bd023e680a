"""optimize: the whole of rate-distortion-optimised mixed-precision PTQ in one call."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from typing_extensions import Unpack

from graphopt.compressors.compressed_program import CompressedProgram, CompressedSet
from graphopt.errors import ArtifactExistsError, InfeasibleError
from graphopt.files import beside, locked, replaced
from graphopt.ir.program import Program
from graphopt.ir.program_set import ProgramSet
from graphopt.run.batches import Batch
from graphopt.run.calibration_data import read_calls
from graphopt.run.set_calls import merged_calls
from graphopt.search.rdo.allocation import Allocation, Rates, allocate
from graphopt.search.rdo.comparison import Evaluate, compare
from graphopt.search.rdo.config import RDOConfig
from graphopt.search.rdo.options import RunKeywords, RunOptions
from graphopt.search.rdo.picture import require_matplotlib, save_comparison
from graphopt.search.rdo.report import BlockReport, Comparison, LayerReport, RDOReport
from graphopt.search.rdo.session import BlockFit, Costs, Session, fits_of
from graphopt.search.rdo.state import RunState, key_of

__all__ = ["Optimized", "optimize"]

_log = logging.getLogger(__name__)
_ENTROPY_ROUNDS = 8
_ENTROPY_MARGIN = 0.02  # bits per weight below the target that will do


class Optimized(NamedTuple):
    """The outcome of `optimize`.

    Attributes:
        program: The compressed program; a `CompressedSet` of a set.
        report: What was done, and how it compares.

    Examples:
        >>> isinstance(optimized, Optimized), type(optimized.program).__name__
        (True, 'CompressedProgram')
    """

    program: Any
    report: RDOReport


def optimize(
    model: nn.Module | ExportedProgram | Program | ProgramSet | str | Path,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    calibration_data: Iterable[Any] = (),
    config: RDOConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    evaluate: Evaluate | None = None,
    evaluation_data: Iterable[Any] | None = None,
    **options: Unpack[RunKeywords],
) -> Optimized:
    """Quantize or palettize a model to a mean number of bits per weight, without labels.

    >>> config = {"target_bits": 8, "candidates": [4, 8], "rounding": {"steps": 10}}
    >>> program, report = optimize(model, example, batches, config)
    >>> program.save("model.pt2").name
    'model.pt2'

    The stages, each of which `config` can switch off and `graphopt.rdo.Session` runs alone:
    sensitivities and a first allocation of bits; rate-distortion optimisation of one block after the
    other, and the allocation again from what it measured; Hessian-guided calibration of every layer;
    adaptive rounding of the blocks that lose most; activations, if wanted; the comparison with
    uniform 8- and 4-bit quantization. One λ holds for all: the loss that a bit must save.

    Args:
        model: A module, an exported program, a `Program`, a `ProgramSet` or a .pt2 file; it is never
            changed.
        example_inputs: Inputs of one call.
        calibration_data: Unlabelled inputs of one call each, samples along the first dimension: a
            tensor, a tuple or list of positional ones, or a dict of keyword ones. 16 to 64 samples a
            call suit adaptive rounding. For a set, {entry point: calls}, or (entry point, inputs)
            pairs and `CallSequence` of such.
        config: An `RDOConfig`, a mapping of its fields, or a YAML file; 4-, 6- and 8-bit integers at
            4.19 bits per weight when None.
        example_kwargs: Keyword inputs of the example call.
        evaluate: Score of a module, larger is better: one number, or one per sample, from which the
            standard error of the drop is computed. It may use labels: it decides nothing.
        evaluation_data: Inputs on which outputs are compared; the calibration data when None.
        options: The fields of `RunOptions`: `out` (folder for report.json, config.yaml, bits.json,
            comparison.png and quantized.pt2), `overwrite`, `resume` (go on with an unfinished run;
            True), `executor` (where candidates are fitted), `progress` (show bars),
            `activation_memory` (bytes of values in memory) and `work_dir` (where others lie).

    Returns:
        The program and the report.

    Raises:
        CaptureError: The model cannot be exported.
        ConfigError: The config is wrong or does not fit the model.
        InputError: Data are missing or do not fit the model, or an unfinished run is another one's.
        InfeasibleError: No choice of candidates is within the target; the message has the range.
        CompressionError: A weight contains NaN or Inf.
        CalibrationError: Inputs of a layer hold NaN or Inf, or activations have no usable range.
        LoweringError: The backend cannot hold a candidate.
        ArtifactExistsError: `out` exists and `overwrite` is False.
        OutputError: `out` cannot be written, or another run writes it.
        MissingDependencyError: `out` is given and matplotlib is not installed.
    """
    if isinstance(model, ProgramSet):
        return _optimized_set(model, calibration_data, config, evaluate, evaluation_data, options)
    run = RunOptions.of("optimize", options)
    target = None if run.out is None else Path(run.out)
    if target is not None:
        require_matplotlib()
        if target.exists() and not run.overwrite:
            raise ArtifactExistsError(f"{target} exists; pass overwrite=True to replace it")
    with contextlib.nullcontext() if target is None else locked(target):
        return _optimized(
            model,
            (example_inputs, example_kwargs),
            calibration_data,
            _config(config),
            _Evaluation(evaluate, evaluation_data),
            run,
        )


def _optimized_set(
    programs: ProgramSet,
    calibration_data: Iterable[Any],
    config: RDOConfig | Mapping[str, Any] | str | Path | None,
    evaluate: Evaluate | None,
    evaluation_data: Iterable[Any] | None,
    options: RunKeywords,
) -> Optimized:
    """All entry points as one program, whose shared weights are decided once."""
    merged = programs.merged()
    held_out = None if evaluation_data is None else merged_calls(programs, evaluation_data)
    made = optimize(
        merged,
        merged.example_args,
        merged_calls(programs, calibration_data),
        config,
        evaluate=evaluate,
        evaluation_data=held_out,
        **options,
    )
    return Optimized(CompressedSet(programs.split(made.program).methods, made.program), made.report)


class _Evaluation(NamedTuple):
    """How the outcome is compared."""

    score: Evaluate | None
    data: Iterable[Any] | None


def _optimized(
    model: nn.Module | ExportedProgram | Program | str | Path,
    example: tuple[tuple[Any, ...] | Tensor | None, Mapping[str, Any] | None],
    calibration_data: Iterable[Any],
    config: RDOConfig,
    evaluation: _Evaluation,
    run: RunOptions,
) -> Optimized:
    progress, watch = run.progress, _Watch()
    target = None if run.out is None else Path(run.out)
    with watch("capture and gradients"):
        session = Session.open(
            model,
            example[0],
            calibration_data,
            config,
            example_kwargs=example[1],
            progress=progress,
            resources=run.resources,
        )
    partial = None if target is None else beside(target, "partial")
    state = RunState(partial, key_of(session) if partial is not None else "", resume=run.resume)
    try:
        with watch("sensitivities"):
            first, losses = _first_allocation(session, state, run.resume, progress)
    except InfeasibleError:
        state.discard()  # no run can go on from it
        raise
    with watch("block-wise search"):
        costs = _costs(session, state, first, losses, run)
    final = _final_allocation(session, first, costs)
    rounded = session.sensitive_blocks(final.choice, costs.losses)
    with watch("calibration and rounding"):
        fits = session.fit(
            final.choice,
            rate_weight=final.rate_weight,
            rounded=rounded,
            known=state.blocks(),
            save=state.add_block,
            progress=progress,
        )
    with watch("conversion"):
        program = session.program(fits, progress=progress)
    given, exact = evaluation.data, session.exact.graph_module
    batches = session.batches if given is None else list(read_calls(exact, given))
    with watch("comparison"):
        rows = compare(session, program, batches, evaluation.score)
    report = _report(session, final, costs, fits, watch.seconds, rows)
    if target is not None:
        _write(target, session, program, report)
        state.discard()
    return Optimized(program, report)


def _config(given: RDOConfig | Mapping[str, Any] | str | Path | None) -> RDOConfig:
    if isinstance(given, RDOConfig):
        return given
    if given is None:
        return RDOConfig(target_bits=4.19)
    if isinstance(given, str | Path):
        return RDOConfig.from_yaml(given)
    return RDOConfig.from_dict(given)


class _Watch:
    """Wall time of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 3)
        _log.info("%s: %.1f s", stage, self.seconds[stage])


def _budget(session: Session) -> float | None:
    target = session.config.target_bits
    return None if target is None else target * session.weights


def _first_allocation(
    session: Session, state: RunState, resume: bool, progress: bool | None
) -> tuple[Allocation, Rates]:
    """Bits from predicted losses of weights that are rounded to the nearest, at fixed widths."""
    table = session.sensitivities(state.sensitivities, resume=resume, progress=progress)
    losses = {
        layer.name: dict(zip(layer.candidates, own, strict=True))
        for layer, own in zip(session.layers, table.losses(), strict=True)
    }
    bits = {
        layer.name: {name: float(layer.bits_of(name)) for name in layer.candidates}
        for layer in session.layers
    }
    target = session.config.target_bits
    if session.config.rate == "fixed" and target is not None:
        least, most = (
            sum(end(own.values()) for own in bits.values()) / session.weights for end in (min, max)
        )
        if least > target:
            raise InfeasibleError(
                f"target_bits={target:g}: attainable are {least:.3f} to {most:.3f} bits per weight,"
                " scales and tables included; raise the target or add narrower candidates"
            )
    if session.config.rate == "entropy" and target is not None:
        # a coder makes less of wide elements: λ from D ∝ 4^−R at the widest candidates
        widest = allocate(losses, bits, budget=None, rate_weight=0.0)
        excess = widest.bits / session.weights - target
        distortion = max(widest.loss, 1e-30) * 4.0**excess
        weight = 2 * math.log(2) * distortion / session.weights
        return replace(widest, rate_weight=weight), losses
    weight_given = session.config.rate_weight
    return allocate(losses, bits, budget=_budget(session), rate_weight=weight_given), losses


def _costs(
    session: Session, state: RunState, first: Allocation, losses: Rates, run: RunOptions
) -> Costs:
    if not session.config.blocks.choose:
        own = {name: dict(by_candidate) for name, by_candidate in losses.items()}
        return Costs(own, {}, dict(first.choice), 0, first.rate_weight)
    known = state.read("search")
    if known is not None:
        return Costs(**known)
    here = {"progress": run.progress, "executor": run.executor}
    costs = session.search(first.rate_weight, **here)
    target = session.config.target_bits
    if session.config.rate == "entropy" and target is not None:
        for _ in range(_ENTROPY_ROUNDS):
            chosen = allocate(costs.losses, costs.bits, budget=None, rate_weight=costs.rate_weight)
            excess = chosen.bits / session.weights - target
            if -_ENTROPY_MARGIN <= excess <= 0:
                break
            # half a bit per octave of λ, and a little less than the target
            weight = costs.rate_weight * 4.0 ** (excess + _ENTROPY_MARGIN / 2)
            costs = session.search(weight, **here)
    state.write("search", asdict(costs))
    return costs


def _final_allocation(session: Session, first: Allocation, costs: Costs) -> Allocation:
    if not costs.bits:
        return first
    budget: float | None = _budget(session)
    if session.config.rate == "entropy":
        budget = None  # scales were found for this λ
    weight = costs.rate_weight if budget is None else None
    return allocate(costs.losses, costs.bits, budget=budget, rate_weight=weight)


def _report(
    session: Session,
    final: Allocation,
    costs: Costs,
    fits: Sequence[BlockFit],
    seconds: dict[str, float],
    rows: tuple[Comparison, ...],
) -> RDOReport:
    forms = fits_of(fits)
    layers = []
    for layer in session.layers:
        form = forms[layer.name]
        stored = layer.bits_of(form.candidate)
        snr = None
        if form.stored is not None and form.stored.sse > 0 and form.stored.energy > 0:
            snr = 10 * math.log10(form.stored.energy / form.stored.sse)
        row = LayerReport(
            name=layer.name,
            shape=layer.shape,
            candidate=form.candidate,
            bits_per_weight=stored / layer.numel,
            stored_bits=stored,
            coded_bits=form.coded / layer.numel,
            loss=costs.losses[layer.name][form.candidate],
            how=form.how,
            snr_db=snr,
            note=form.note,
        )
        layers.append(row)
    blocks = tuple(_block_report(fit) for fit in fits)
    samples = sum(_samples(batch) for batch in session.batches)
    coded = sum(form.coded for form in forms.values())
    return RDOReport(
        versions={"graphopt": version("graphopt"), "torch": torch.__version__},
        fingerprint=session.exact.fingerprint(),
        config=session.config.model_dump(mode="json"),
        samples=samples,
        rate_weight=final.rate_weight,
        bits_per_weight=sum(layer.stored_bits for layer in layers) / session.weights,
        coded_bits_per_weight=coded / session.weights,
        predicted_loss=sum(layer.loss for layer in layers),
        moves=costs.moves,
        seconds=seconds,
        layers=tuple(layers),
        blocks=blocks,
        metric=session.config.metric,
        comparison=rows,
    )


def _block_report(fit: BlockFit) -> BlockReport:
    names, done = tuple(fit.layers), fit.rounded
    if done is None:
        return BlockReport(number=fit.number, layers=names, rounded=False)
    return BlockReport(
        number=fit.number,
        layers=names,
        rounded=True,
        accepted=done.accepted,
        before=done.before,
        after=done.after,
        changed=done.changed,
        undecided=done.undecided,
    )


def _samples(batch: Batch) -> int:
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return int(tensors[0].shape[0]) if tensors and tensors[0].ndim else 1


def _write(target: Path, session: Session, program: CompressedProgram, report: RDOReport) -> None:
    with replaced(target) as folder:
        folder.mkdir()
        report.save(folder / "report.json")
        (folder / "config.yaml").write_text(session.config.to_yaml(), encoding="utf-8")
        (folder / "bits.json").write_text(json.dumps(report.bits(), indent=2) + "\n")
        save_comparison(report, folder / "comparison.png")
        program.save(folder / "quantized.pt2")
