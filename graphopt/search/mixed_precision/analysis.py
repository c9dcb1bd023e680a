"""analyze: how much each candidate of each layer costs at the model's outputs."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import pickle
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from typing_extensions import Unpack

from graphopt.audited import read_exported, read_pickle_of_ours
from graphopt.backends.lowering import as_program
from graphopt.errors import InputError
from graphopt.files import locked
from graphopt.ir.program import Program
from graphopt.progress import track
from graphopt.run.batches import Batch
from graphopt.run.calibration_data import data_list, read_calls
from graphopt.run.content import content_hash, tensors_hash
from graphopt.run.workers import executor_of
from graphopt.search.mixed_precision.artifacts import artifact_for
from graphopt.search.mixed_precision.candidates import as_candidates
from graphopt.search.mixed_precision.exact import Bench, Values, make_bench, measure_batch
from graphopt.search.mixed_precision.fast import FAST_METRICS, draw_vectors
from graphopt.search.mixed_precision.layers import (
    find_layers,
    floats_of,
    refuse_unsupported,
    rest_bits,
)
from graphopt.search.mixed_precision.measurements import Measurements
from graphopt.search.mixed_precision.metrics import METRICS, Compare, Metric, as_metric
from graphopt.search.mixed_precision.options import AnalysisKeywords, AnalysisOptions, Candidates
from graphopt.search.mixed_precision.reach import columns_of
from graphopt.search.mixed_precision.records import (
    Header,
    Records,
    Vectors,
    batch_hash,
)
from graphopt.search.mixed_precision.sensitivity_table import SensitivityTable
from graphopt.search.mixed_precision.sizes import SizeModel

__all__ = ["analyze"]

_log = logging.getLogger(__name__)


def analyze(
    model: nn.Module | ExportedProgram | Program | str | Path,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    candidates: Candidates = (2, 4, 6),
    data: Iterable[Any] = (),
    metric: str | Compare | Metric | Sequence[str | Compare | Metric] = "psnr",
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[AnalysisKeywords],
) -> SensitivityTable:
    """Measure how much each candidate of each layer changes the model's outputs.

    >>> table = analyze(model, example, [2, 4, 6], batches, path="model.sensitivity.jsonl")
    >>> recipe = table.recipe(target_bpw=4)

    Palettes are found by k-means on the weights; what calibration or training make of them later
    ("skm", "gptq", DKM) is not part of the measurement.

    Args:
        model: A module, an exported program, a `Program` or a .pt2 file; it is never changed.
        example_inputs: Inputs of one call.
        candidates: What every layer can become, see `as_candidates`.
        data: Inputs of one call each, unlabelled: a tensor, a tuple or list of positional ones, or
            a dict of keyword ones. Batches are the unit of averaging and of distribution.
        metric: "psnr" (dB, on the outputs), "mse", "kl" (nats; logits), "cosine", "top1"
            (agreement), a callable `(output, reference) → float`, or several, of which the first
            decides. The mean over outputs and batches counts.
        example_kwargs: Keyword inputs of the example call.
        options: How it is measured, the fields of `AnalysisOptions`: `mode` ("exact", "fast" or
            "hybrid"), `backend` (target whose sizes and limits count), `precision` and `lowering`
            (its options), `layer_candidates` (candidates of single layers), `correction` (measure
            under it), `path` (file that grows with every measurement), `resume` (go on with it),
            `executor` (runs batches), `draws`, `max_vectors`, `weight_threshold`, `float_dtype`,
            `lut_dtype`, `seed` and `progress`.

    Raises:
        CaptureError: The model cannot be exported.
        ConfigError: A candidate cannot be read, or a pattern matches no layer.
        LoweringError: The backend cannot hold a candidate, or has no such option.
        InputError: There are no data, they do not fit the model, the metric is unknown or cannot be
            predicted, or the file belongs to another model, other data, settings or metrics.
        OutputError: The file cannot be written, or another run writes it.
        CompressionError: A weight contains NaN or Inf.
        OptionError: There is no such option.
    """
    how = AnalysisOptions.of("analyze", options)
    several = isinstance(metric, Sequence) and not isinstance(metric, str)
    wanted: Sequence[Any] = metric if several else [metric]  # type: ignore[assignment]
    metrics = tuple(as_metric(given) for given in wanted)
    if how.mode != "exact" and metrics[0].name not in FAST_METRICS:
        raise InputError(f"the fast mode predicts {list(FAST_METRICS)}, not {metrics[0].name!r}")
    calls = data_list(data)
    if calls is None:
        raise InputError("there are no data to measure on; give `data`, inputs of one call each")
    general = as_candidates(candidates)
    special = {
        pattern: as_candidates(group) for pattern, group in (how.layer_candidates or {}).items()
    }
    artifact = artifact_for(how.backend, how.precision, how.lowering, how.float_dtype)
    program = as_program(model, example_inputs, example_kwargs)
    gm = program.graph_module
    lowering = {} if artifact is None else dict(artifact.lowering)
    own = floats_of(program)
    sizes = SizeModel.of(how.backend, how.float_dtype, how.lut_dtype, lowering, own)
    batches = list(read_calls(gm, calls))
    layers, known = find_layers(gm, general, special, sizes, how.weight_threshold)
    if sizes.backend is not None:
        refuse_unsupported(tuple(known.values()), sizes.backend)
    header = Header(
        program.fingerprint(),
        tensors_hash(gm),
        tuple(metric.name for metric in metrics),
        tuple(
            "" if metric == METRICS.get(metric.name) else content_hash(metric.compare)
            for metric in metrics
        ),
        how.mode,
        how.correction,
        how.draws,
        _group(batches, how.draws, how.max_vectors),
        how.seed,
        sizes.to_dict(),
        rest_bits(program, layers, sizes),
        known,
        tuple(layers),
        lowering,
    )
    path = None if how.path is None else Path(how.path)
    with contextlib.nullcontext() if path is None else locked(path):
        records = Records.open(header, path, resume=how.resume)
        for number, batch in enumerate(batches):
            records.check_batch(number, batch_hash(batch))
        _drop_beyond(records, len(batches))
        if _missing(records, len(batches)):
            bench = make_bench(program, header, metrics, batches, progress=how.progress)
            _run(bench, program, records, batches, executor_of(how.executor), how.progress)
    table = SensitivityTable(records, program, metrics[0])
    _say_unreached(table)
    return table


def _group(batches: Sequence[Batch], draws: int, most: int) -> int:
    """Samples of a vector."""
    first = [leaf for leaf in pytree.tree_leaves(batches[0]) if isinstance(leaf, Tensor)]
    samples = int(first[0].shape[0]) if first and first[0].ndim else 1
    return min(max(1, math.ceil(samples * len(batches) * draws / most)), samples)


def _drop_beyond(records: Records, count: int) -> None:
    """Fewer data than the file has measured: only those given count."""
    records.values = {key: value for key, value in records.values.items() if key[0] < count}
    records.vectors = {key: value for key, value in records.vectors.items() if key < count}
    records.missed = {key for key in records.missed if key[0] < count}


def _missing(records: Records, count: int) -> list[int]:
    """Batches of which something is not measured yet."""
    mode, layers = records.header.mode, records.header.layers
    missing = []
    for number in range(count):
        exact = mode == "fast" or all((number, layer.name) in records.values for layer in layers)
        drawn = mode == "exact" or number in records.vectors
        if not (exact and drawn):
            missing.append(number)
    return missing


# --- running, here or elsewhere -------------------------------------------------------------------
def _known(records: Records, number: int) -> list[str]:
    return [layer for batch, layer in records.values if batch == number]


def _run(
    bench: Bench,
    program: Program,
    records: Records,
    batches: Sequence[Batch],
    executor: Executor | None,
    progress: bool | None,
) -> None:
    header = records.header
    missing = _missing(records, len(batches))
    if executor is None:
        for number in track(missing, "measuring", len(missing), enabled=progress):
            for result in _one_batch(
                bench,
                header,
                batches[number],
                number,
                _known(records, number),
                number in records.vectors,
            ):
                _take(records, number, result)
        return
    payload = _payload(program, header, bench)
    futures: dict[Future[Any], int] = {}
    try:
        for number in missing:
            future = executor.submit(
                _remote,
                payload,
                batches[number],
                number,
                _known(records, number),
                number in records.vectors,
            )
            futures[future] = number
        done = track(as_completed(futures), "measuring", len(futures), enabled=progress)
        for future in done:
            for result in future.result():
                _take(records, futures[future], result)
    finally:
        for future in futures:
            future.cancel()


@dataclass(frozen=True)
class _Result:
    """What one batch says of one layer, or, in vectors, of all."""

    layer: str = ""
    values: Values = field(default_factory=dict)
    missed: bool = False
    vectors: Vectors | None = None


def _take(records: Records, number: int, result: _Result) -> None:
    if result.vectors is not None:
        records.add_vectors(number, result.vectors)
    else:
        records.add(number, result.layer, result.values, missed=result.missed)


def _one_batch(
    bench: Bench, header: Header, batch: Batch, number: int, skip: Sequence[str], drawn: bool
) -> Iterator[_Result]:
    known = set(skip)
    if header.mode != "exact" and not drawn:
        seed = header.seed * 1_000_003 + number
        vectors = draw_vectors(bench, batch, draws=header.draws, seed=seed, group=header.group)
        if header.mode == "fast":
            known |= _with_gradient(header, vectors)
            for measured in measure_batch(bench, batch, known):
                yield _Result(*measured)
        yield _Result(vectors=vectors)
    if header.mode != "fast":
        for measured in measure_batch(bench, batch, known):
            yield _Result(*measured)


def _with_gradient(header: Header, vectors: Vectors) -> set[str]:
    """Layers of which the vectors of a batch say anything."""
    columns = columns_of(header.layers)
    return {layer for layer, own in columns.items() if bool(vectors[:, own].any())}


def _say_unreached(table: Measurements) -> None:
    """Warn of layers about which the data or the gradients say nothing."""
    blind, lost = table.without_gradient, table.missed
    if blind:
        _log.warning("no gradient reaches %s: measured on the outputs instead", ", ".join(blind))
    if lost:
        _log.warning(
            "no batch reaches %s: its candidates count as without loss; add data that do",
            ", ".join(lost),
        )


def _payload(program: Program, header: Header, bench: Bench) -> bytes:
    """What a worker needs, whatever the batch."""
    buffer = io.BytesIO()
    torch.export.save(program.export(dynamic=True), buffer)
    metrics = [metric.name if metric == _named(metric.name) else metric for metric in bench.metrics]
    try:
        return pickle.dumps((buffer.getvalue(), header, metrics, bench.statistics))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"the metric cannot be sent to an executor: {error}; define it in a module"
        ) from None


def _named(name: str) -> Metric | None:
    try:
        return as_metric(name)
    except InputError:
        return None


def _remote(
    payload: bytes, batch: Batch, number: int, skip: Sequence[str], drawn: bool
) -> list[_Result]:
    bench, header = _received(payload)
    return list(_one_batch(bench, header, batch, number, skip, drawn))


_building = threading.Lock()


def _received(payload: bytes) -> tuple[Bench, Header]:
    """The bench of a payload; every process builds it once."""
    with _building:
        return _built(payload)


@functools.lru_cache(maxsize=1)
def _built(payload: bytes) -> tuple[Bench, Header]:
    content, header, given, statistics = read_pickle_of_ours(payload)
    program = as_program(read_exported(io.BytesIO(content)))
    metrics = tuple(as_metric(metric) for metric in given)
    return make_bench(program, header, metrics, (), statistics=statistics, progress=False), header
