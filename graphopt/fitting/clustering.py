"""Palettes from weights alone, or from weights and the importance of their elements."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from graphopt.errors import CompressionError
from graphopt.ir.annotations import WeightAnnotation, palette_annotation
from graphopt.ir.editor import Editor
from graphopt.ir.mapped import kept_in_files, release
from graphopt.numerics.device import chosen_device, computing_on
from graphopt.progress import track
from graphopt.run.memory import give_back
from graphopt.run.workers import Task, run_tasks
from graphopt.schemes.palettize import PalettizedWeight, palettize
from graphopt.specs import PalettizationSpec

__all__ = ["cluster_annotated"]

_LARGE = 1 << 20  # elements
_FLOOR = 1e-3  # of the mean importance


def cluster_annotated(
    gm: fx.GraphModule,
    *,
    progress: bool | None = None,
    seed: int = 0,
    importance: Mapping[str, Tensor] | None = None,
    names: Collection[str] | None = None,
    executor: Any = None,
    folder: Path | None = None,
) -> dict[str, PalettizedWeight]:
    """Cluster every annotated weight of a graph, layers side by side.

    Args:
        gm: A graph that `AnnotatePalettization` has seen.
        progress: Show a bar; None shows it on a terminal.
        seed: Seed of vector tables.
        importance: Name → weight of each element's squared error; others weigh all alike, and so
            do elements without any beside a thousandth of the mean.
        names: Weights to cluster; None is all.
        executor: Where weights are clustered, as for `run_tasks`; the tables do not depend on it.
        folder: Folder that codes move to as soon as they are found; None keeps them in memory.

    Returns:
        Name of the tensor → its palettized form, in the order of the graph.

    Raises:
        CompressionError: A weight contains NaN or Inf; the message names it.

    Examples:
        >>> from graphopt.palettization import KMeansPalettizerConfig
        >>> from graphopt.passes import AnnotatePalettization
        >>> gm = program.graph_module
        >>> _ = AnnotatePalettization(KMeansPalettizerConfig())(gm)
        >>> list(cluster_annotated(gm))
        ['0.weight', '2.weight']
    """
    weights = _annotated(gm)
    if names is not None:
        weights = {name: weights[name] for name in weights if name in set(names)}
    order = sorted(weights, key=lambda name: -weights[name][0].numel())
    tasks = (_task(name, *weights[name], importance or {}, seed) for name in order)
    palettes = track(
        run_tasks(_cluster, tasks, executor), "palettizing", len(order), enabled=progress
    )
    done = {}
    for name, palettized in zip(order, palettes, strict=True):
        done[name] = kept_in_files(palettized, folder)
        release(weights[name][0])
        if weights[name][0].numel() > _LARGE:
            give_back()
    return {name: done[name] for name in weights}


def _task(
    name: str,
    tensor: Tensor,
    annotation: WeightAnnotation[PalettizationSpec],
    importance: Mapping[str, Tensor],
    seed: int,
) -> Task:
    weighed = {"importance": importance[name]} if name in importance else {}
    device = chosen_device()
    place = None if device is None else str(device)
    arguments = (name, annotation.spec, annotation.output_axis, seed, place)
    return Task(arguments, {"weight": tensor, **weighed})


def _cluster(
    tensors: Mapping[str, Tensor],
    name: str,
    spec: PalettizationSpec,
    output_axis: int,
    seed: int,
    device: str | None,
) -> PalettizedWeight:
    try:
        with computing_on(device):
            return palettize(
                tensors["weight"],
                spec,
                output_axis=output_axis,
                seed=seed,
                importance=_smoothed(tensors.get("importance")),
            )
    except CompressionError as error:
        raise CompressionError(
            f"{name}: {error}; exclude it in the config or repair the model"
        ) from None


def _smoothed(importance: Tensor | None) -> Tensor | None:
    """Importance with a floor, so that what the data did not reach keeps its place."""
    if importance is None or not bool(importance.any()):
        return None
    return importance + _FLOOR * importance.mean()


def _annotated(
    gm: fx.GraphModule,
) -> dict[str, tuple[Tensor, WeightAnnotation[PalettizationSpec]]]:
    edit = Editor(gm)
    annotated: dict[str, tuple[Tensor, WeightAnnotation[PalettizationSpec]]] = {}
    seen: set[int] = set()
    for node in edit.constants():
        annotation = palette_annotation(node)
        if annotation is None:
            continue
        tensor = edit.value(node)
        if id(tensor) not in seen:
            seen.add(id(tensor))
            annotated[str(node.target)] = (tensor, annotation)
    return annotated
