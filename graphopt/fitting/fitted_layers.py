"""The layers that a long fit has finished, in a folder from which it goes on after an interruption."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt.audited import read_tensors
from graphopt.errors import InputError
from graphopt.files import replaced
from graphopt.fitting.evidence import Evidence
from graphopt.fitting.layer_tasks import Found, StoredT
from graphopt.ir.annotations import describe_annotations
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.program import Program
from graphopt.run.content import content_hash, tensors_hash
from graphopt.run.record_file import sealed, unsealed
from graphopt.run.workers import Task, run_tasks
from graphopt.schemes.registry import stored_from

__all__ = ["FittedLayers"]

_log = logging.getLogger(__name__)
_FORMAT, _VERSION = "graphopt fitted layers", 1


class FittedLayers:
    """What was found, one file for each layer, sealed by a checksum that covers all that decides it.

    What is damaged is left out and said: it is fitted again.

    Args:
        evidence: What a calibration has seen, and where the files lie (`Resources.work_dir`).
        kind: What is fitted, a name for files.
        annotated: The annotated graph.
        names: Weights that are fitted.

    Raises:
        InputError: What is there belongs to another model, other data or another config.
    """

    def __init__(
        self,
        evidence: Evidence,
        kind: str,
        annotated: CapturedModule,
        names: Sequence[str],
    ) -> None:
        work = evidence.resources.work_dir
        self.folder = None if work is None else Path(work) / kind
        self._key = ""
        if self.folder is None:
            return
        self._key = _key_of(evidence, annotated, names)
        head = {"format": _FORMAT, "version": _VERSION, "key": self._key}
        path = self.folder / "key"
        content = unsealed(path.read_bytes()) if path.exists() else None
        if content is not None and content != head:
            raise InputError(
                f"{self.folder} holds layers that were fitted to another model, other data or another"
                " config; give another work_dir, or delete it"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        if content is None:
            for old in self.folder.glob("*.pt"):
                old.unlink()
            with replaced(path) as temporary:
                temporary.write_bytes(sealed(head))

    def _path(self, name: str) -> Path | None:
        place = hashlib.sha256(name.encode()).hexdigest()[:32]
        return None if self.folder is None else self.folder / f"{place}.pt"

    def fitted(
        self,
        fit: Callable[..., Found[StoredT]],
        tasks: Mapping[str, Callable[[], Task]],
        executor: Any,
    ) -> Iterator[Found[StoredT]]:
        """What is found for some weights, in order: read from the folder, or fitted and kept there.

        Args:
            fit: What finds it.
            tasks: Name of a weight → what makes the task of its fit.
            executor: As for `run_tasks`.
        """
        known = {name: self.get(name) for name in tasks}
        missing = (task() for name, task in tasks.items() if known[name] is None)
        fresh = run_tasks(fit, missing, executor, threads=False)
        for name, old in known.items():
            found = old
            if found is None:
                found = next(fresh)
                self.add(name, found)
            yield found

    def get(self, name: str) -> Found[Any] | None:
        """What was found for a weight, or None."""
        path = self._path(name)
        if path is None or not path.exists():
            return None
        head, _, payload = path.read_bytes().partition(b"\n")
        wanted = unsealed(head, self._key)
        if wanted is None or hashlib.sha256(payload).hexdigest() != wanted["sha256"]:
            _log.warning("%s is damaged: %s is fitted again", path, name)
            return None
        data: Mapping[str, Any] = read_tensors(io.BytesIO(payload))
        return Found(stored_from(data["stored"]), data["bias"], data["fallback"])

    def add(self, name: str, found: Found[Any]) -> None:
        """Keep what was found for a weight."""
        path = self._path(name)
        if path is None:
            return
        content = io.BytesIO()
        state = {"stored": found.stored.to_state(), "bias": found.bias, "fallback": found.fallback}
        torch.save(state, content)
        payload = content.getvalue()
        head = sealed({"sha256": hashlib.sha256(payload).hexdigest()}, self._key)
        with replaced(path) as temporary:
            temporary.write_bytes(head + b"\n" + payload)


def _key_of(evidence: Evidence, annotated: CapturedModule, names: Sequence[str]) -> str:
    digest = hashlib.sha256(Program(annotated, ()).fingerprint().encode())
    digest.update(tensors_hash(annotated).encode())
    digest.update("\n".join(names).encode())
    for node in annotated.graph.nodes:
        digest.update(f"{node.name} {describe_annotations(node)}\n".encode())
    calls = [pytree.tree_leaves(batch) for batch in evidence.batches]
    seen = (calls, evidence.saliency, evidence.spread, evidence.scales)
    for part in (*seen, evidence.correct_bias, evidence.seed, evidence.resources.device):
        digest.update(content_hash(part).encode())
    digest.update(f"{version('graphopt')} {torch.__version__}".encode())
    return digest.hexdigest()
