"""The models of a sweep, made and scored here or by workers."""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from graphopt.audited import read_exported
from graphopt.backends.lowering import as_program
from graphopt.compressors.joint import compress
from graphopt.errors import InputError
from graphopt.exclusive import exclusive
from graphopt.ir.program import Program
from graphopt.run.workers import Task, executor_of, run_tasks
from graphopt.search.mixed_precision.recipe import Recipe

__all__ = ["UNCOMPRESSED", "scores"]

UNCOMPRESSED = "uncompressed"
_Apply = Callable[[Recipe], Any]
_making = threading.Lock()


def scores(
    program: Program,
    recipes: Iterable[tuple[str, Recipe]],
    evaluate: Callable[[Any], Any],
    apply: _Apply | None,
    workers: Any,
) -> Iterator[float]:
    """The score of every model, in order.

    Args:
        program: The uncompressed program.
        recipes: Kind of a point, its recipe.
        evaluate: Module → score, or one per sample.
        apply: Recipe → compressed module; None gives palettes by k-means.
        workers: What `executor=` takes; None scores one model after the other.

    Raises:
        InputError: A function cannot be sent to workers in other processes.
    """
    executor = executor_of(workers)
    if executor is None or isinstance(executor, ThreadPoolExecutor):
        given = (Task((program, kind, recipe, apply, evaluate)) for kind, recipe in recipes)
        yield from run_tasks(_scored, given, workers, threads=False)
        return
    _refuse_what_stays(executor, apply, evaluate)
    content = io.BytesIO()
    torch.export.save(program.export(dynamic=True), content)
    stored = torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8)
    tasks = (Task((kind, recipe, apply, evaluate), {"program": stored}) for kind, recipe in recipes)
    yield from run_tasks(_scored_elsewhere, tasks, workers)


def _refuse_what_stays(executor: Executor, *functions: Any) -> None:
    for function in functions:
        try:
            pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"{function!r} cannot be sent to a {type(executor).__name__}: {error}; define it in a"
                " module, or take a ThreadPoolExecutor"
            ) from None


def _scored(
    tensors: Mapping[str, Tensor],
    program: Program,
    kind: str,
    recipe: Recipe,
    apply: _Apply | None,
    evaluate: Callable[[Any], Any],
) -> float:
    assert not tensors
    with exclusive():
        if kind == UNCOMPRESSED:
            module: Any = program.module()
        elif apply is not None:
            module = apply(recipe)
        else:
            module = compress(program, None, recipe.to_config(algorithm="kmeans")).module()
    return float(torch.as_tensor(evaluate(module)).double().mean())


def _scored_elsewhere(tensors: Mapping[str, Tensor], *arguments: Any) -> float:
    content = tensors["program"].numpy().tobytes()
    with _making:
        program = _program(_Bytes(content))
    return _scored({}, program, *arguments)


class _Bytes:
    """The bytes of a program, compared by what they are."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self._digest = hashlib.sha256(content).digest()

    def __hash__(self) -> int:
        return hash(self._digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bytes) and self._digest == other._digest


@functools.lru_cache(maxsize=1)
def _program(stored: _Bytes) -> Program:
    """The program of some bytes; a process reads it once."""
    return as_program(read_exported(io.BytesIO(stored.content)))
