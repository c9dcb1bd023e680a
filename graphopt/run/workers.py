"""Independent tasks on the threads of this process, or on any executor; results do not depend on which."""

from __future__ import annotations

import io
import pickle
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from graphopt.audited import read_pickle_of_ours
from graphopt.errors import InputError
from graphopt.extras import require
from graphopt.ir.mapped import map_tensor
from graphopt.numerics.parallel import map_tasks

__all__ = ["Task", "Workers", "dask_workers", "executor_of", "run_tasks"]

R = TypeVar("R")
_UNKNOWN_WORKERS = 16


@dataclass(frozen=True)
class Task:
    """One of many that need nothing of each other.

    Attributes:
        arguments: Plain values, which travel to the worker; tensors in them do not.
        tensors: What the worker reads from storage that it shares with this process.
    """

    arguments: Sequence[Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Workers:
    """An executor, and how its workers come by tensors.

    Attributes:
        executor: Any `concurrent.futures.Executor`, or a `distributed.Client` or cluster of Dask.
        folder: Folder that all workers see under this path, for tensors on their way; None is one of
            this machine's, which is enough for workers on it. Files are gone when the work is done.

    Examples:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> from graphopt.palettization import KMeansPalettizerConfig
        >>> from graphopt.passes import AnnotatePalettization, cluster_annotated
        >>> gm = program.graph_module
        >>> _ = AnnotatePalettization(KMeansPalettizerConfig())(gm)
        >>> with ThreadPoolExecutor(2) as pool:
        ...     palettes = cluster_annotated(gm, executor=Workers(pool))
        >>> list(palettes)
        ['0.weight', '2.weight']
    """

    executor: Any
    folder: str | Path | None = None


def executor_of(given: Any) -> Executor | None:
    """What can be submitted to, of whatever `executor=` takes.

    Args:
        given: None, an executor, a client or cluster of Dask, or `Workers` of any of these.

    Raises:
        InputError: It is nothing of these.
    """
    if isinstance(given, Workers):
        given = given.executor
    if given is None or isinstance(given, Executor):
        return given
    if hasattr(given, "get_client") and not hasattr(given, "get_executor"):
        given = given.get_client()  # a cluster
    if hasattr(given, "get_executor"):
        executor = given.get_executor(pure=False)
        assert isinstance(executor, Executor)
        return executor
    raise InputError(
        "executor must be a concurrent.futures.Executor or a Dask client or cluster, got"
        f" {type(given).__name__}"
    )


@contextmanager
def dask_workers(address: str | None, folder: str | Path | None = None) -> Iterator[Workers | None]:
    """The workers of a Dask scheduler; None without an address.

    Args:
        address: Such as "tcp://10.0.0.1:8786".
        folder: As for `Workers`.

    Raises:
        MissingDependencyError: Dask is not installed; the message names the extra.
        InputError: No scheduler answers.
    """
    if address is None:
        yield None
        return
    distributed: Any = require("distributed", "distributed")
    try:
        client = distributed.Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise InputError(f"no Dask scheduler answers at {address}: {error}") from error
    with client:
        yield Workers(client, folder)


def run_tasks(
    function: Callable[..., R],
    tasks: Iterable[Task],
    workers: Any = None,
    *,
    threads: bool = True,
) -> Iterator[R]:
    """`function(tensors, *arguments)` of every task, in their order.

    Where the executor's workers are other processes, the tensors of the next few tasks lie in files
    that the workers map into memory; only arguments and results travel.

    Args:
        function: Of a module, so that other processes find it.
        tasks: They are read as they are needed.
        workers: What `executor=` takes; None runs them here.
        threads: Whether None runs them on the cores that torch may use, or one after the other.

    Raises:
        InputError: `workers` is no executor.
    """
    executor = executor_of(workers)
    if executor is None:

        def run(task: Task) -> R:
            return function(task.tensors, *task.arguments)

        yield from map_tasks(run, tasks) if threads else map(run, tasks)
        return
    here = isinstance(executor, ThreadPoolExecutor)
    folder = workers.folder if isinstance(workers, Workers) else None
    waiting: deque[tuple[Future[Any], list[Path] | None]] = deque()
    with tempfile.TemporaryDirectory(prefix="graphopt-", dir=folder) as name:
        shelf = None if here else _Shelf(Path(name))
        try:
            for task in tasks:
                if len(waiting) >= 2 * _count(executor):
                    yield _taken(*waiting.popleft(), shelf)
                waiting.append(_submitted(executor, function, task, shelf))
            while waiting:
                yield _taken(*waiting.popleft(), shelf)
        finally:
            for future, _ in waiting:
                future.cancel()


class _Shelf:
    """Tensors in files, each once however many tasks read it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._readers: dict[Path, int] = {}
        self._known: dict[tuple[Any, ...], tuple[Path, Tensor]] = {}

    def put(self, tensor: Tensor) -> Path:
        """The file of a tensor, for one more reader."""
        plain = tensor.detach()
        place = plain.untyped_storage().data_ptr(), plain.storage_offset()
        key = (*place, tuple(plain.shape), plain.stride(), plain.dtype)
        # an address is a tensor's own only as long as it lives
        path, _ = self._known.get(key, (self.folder / f"{uuid.uuid4().hex}.bin", plain))
        if key not in self._known:
            _bytes_of(plain).numpy().tofile(path)
            self._known[key] = path, plain
            self._readers[path] = 0
        self._readers[path] += 1
        return path

    def give_back(self, paths: Iterable[Path]) -> None:
        """One reader less for each; files without any go."""
        for path in paths:
            self._readers[path] -= 1
        left = {path for path, count in self._readers.items() if not count}
        self._known = {key: held for key, held in self._known.items() if held[0] not in left}
        for path in left:
            del self._readers[path]
            path.unlink()


def _count(executor: Executor) -> int:
    """How many workers there are; a Dask client counts their threads."""
    client = getattr(executor, "_client", None)
    if client is not None:
        return max(1, sum(client.ncores().values()))
    return int(getattr(executor, "_max_workers", _UNKNOWN_WORKERS))


def _submitted(
    executor: Executor, function: Callable[..., Any], task: Task, shelf: _Shelf | None
) -> tuple[Future[Any], list[Path] | None]:
    if shelf is None:
        return executor.submit(function, task.tensors, *task.arguments), None
    paths: list[Path] = []
    content = io.BytesIO()
    _Pickler(content, shelf, paths).dump((dict(task.tensors), *task.arguments))
    return executor.submit(_elsewhere, function, content.getvalue()), paths


class _Pickler(pickle.Pickler):
    """Leaves tensors, wherever they are, to a shelf."""

    def __init__(self, content: io.BytesIO, shelf: _Shelf, paths: list[Path]) -> None:
        super().__init__(content)
        self._shelf, self._paths = shelf, paths

    @override
    def persistent_id(self, obj: Any) -> tuple[str, list[int], torch.dtype] | None:
        if type(obj) not in (Tensor, nn.Parameter):
            return None
        self._paths.append(self._shelf.put(obj))
        return str(self._paths[-1]), list(obj.shape), obj.dtype


class _ResultPickler(pickle.Pickler):
    """Tensors by their bytes: torch's own way makes an archive of each, and copies it twice."""

    @override
    def reducer_override(self, obj: Any) -> Any:
        plain = type(obj) is Tensor and obj.layout == torch.strided and not obj.is_meta
        if not plain or obj.is_quantized or obj.requires_grad:
            return NotImplemented
        content = bytearray(_bytes_of(obj).numpy().data)
        return _tensor, (content, list(obj.shape), obj.dtype)


def _bytes_of(tensor: Tensor) -> Tensor:
    flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8)


def _tensor(content: bytearray, shape: list[int], dtype: torch.dtype) -> Tensor:
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).reshape(shape)


def _taken(future: Future[Any], paths: list[Path] | None, shelf: _Shelf | None) -> Any:
    result = future.result()
    if paths is None or shelf is None:
        return result
    shelf.give_back(paths)
    return read_pickle_of_ours(result)


def _read(named: tuple[str, list[int], torch.dtype]) -> Tensor:
    path, shape, dtype = named
    if torch.Size(shape).numel() == 0:
        return torch.empty(shape, dtype=dtype)
    return map_tensor(path, 0, shape, dtype)


def _elsewhere(function: Callable[..., Any], content: bytes) -> bytes:
    """What a worker does; tensors come back by value, not by handles that end with the worker."""
    results = io.BytesIO()
    with torch.no_grad():
        _ResultPickler(results, protocol=5).dump(function(*read_pickle_of_ours(content, _read)))
    return results.getvalue()
