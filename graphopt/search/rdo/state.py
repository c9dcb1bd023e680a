"""What a run has finished, in a folder beside its results, so that it can go on after an interruption."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from graphopt.audited import read_tensors
from graphopt.errors import GraphOptError, InputError
from graphopt.files import delete_path, replaced
from graphopt.run.content import tensors_hash
from graphopt.run.record_file import sealed, unsealed
from graphopt.schemes.registry import stored_from
from graphopt.search.mixed_precision.records import batch_hash
from graphopt.search.rdo.adaptive_rounding import Rounded
from graphopt.search.rdo.layer_fit import LayerFit
from graphopt.search.rdo.session import BlockFit, Session

__all__ = ["RunState", "key_of"]

_log = logging.getLogger(__name__)
_FORMAT, _VERSION = "graphopt rdo run", 2


def key_of(session: Session) -> str:
    """Hash of everything that decides the outcome: graph, tensors, data, config, versions."""
    digest = hashlib.sha256(session.exact.fingerprint().encode())
    digest.update(tensors_hash(session.exact.graph_module).encode())
    for batch in session.batches:
        digest.update(batch_hash(batch).encode())
    digest.update(session.config.to_yaml().encode())
    digest.update(f"{_FORMAT} {_VERSION} {version('graphopt')} {torch.__version__}".encode())
    return digest.hexdigest()


class RunState:
    """Finished stages and blocks of one run, each sealed by a checksum that covers the run's key.

    What is damaged is left out and said: it is computed again.

    Args:
        folder: Where they are kept; None keeps nothing.
        key: From `key_of`.
        resume: Go on with what is there; False begins anew.

    Raises:
        InputError: What is there belongs to another model, other data or another config.
    """

    def __init__(self, folder: Path | None, key: str, *, resume: bool) -> None:
        self.folder, self._key = folder, key
        if folder is None:
            return
        head = {"format": _FORMAT, "version": _VERSION, "key": key}
        if not resume or not (folder / "key").exists():
            delete_path(folder)
        else:
            content = unsealed((folder / "key").read_bytes())
            if content is None:
                _log.warning("%s: the key is damaged; what it is the key of is kept", folder)
            elif content != head:
                raise InputError(
                    f"{folder} holds an unfinished run of another model, other data or another"
                    " config; finish that one, delete the folder, or begin anew (resume=False, --restart)"
                )
        folder.mkdir(parents=True, exist_ok=True)
        self._put("key", sealed(head))

    def _put(self, name: str, content: bytes) -> None:
        if self.folder is not None:
            with replaced(self.folder / name) as temporary:
                temporary.write_bytes(content)

    @property
    def sensitivities(self) -> Path | None:
        """File of the sensitivity table."""
        return None if self.folder is None else self.folder / "sensitivities.jsonl"

    def read(self, name: str) -> Any:
        """The outcome of a stage, or None."""
        path = None if self.folder is None else self.folder / f"{name}.json"
        if path is None or not path.exists():
            return None
        value = unsealed(path.read_bytes(), self._key)
        if value is None:
            _log.warning("%s is damaged and computed again", path)
        return value

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep the outcome of a stage: plain values."""
        self._put(f"{name}.json", sealed(value, self._key))

    def add_block(self, block: BlockFit) -> None:
        """Keep a finished block."""
        if self.folder is None:
            return
        layers = {name: _plain_fit(fitted) for name, fitted in block.layers.items()}
        rounded = None if block.rounded is None else {**asdict(block.rounded), "fitted": {}}
        content = io.BytesIO()
        torch.save({"number": block.number, "layers": layers, "rounded": rounded}, content)
        payload = content.getvalue()
        head = sealed({"sha256": hashlib.sha256(payload).hexdigest()}, self._key)
        self._put(f"block{block.number}.pt", head + b"\n" + payload)

    def blocks(self) -> dict[int, BlockFit]:
        """Finished blocks by number."""
        blocks: dict[int, BlockFit] = {}
        for path in [] if self.folder is None else sorted(self.folder.glob("block*.pt")):
            block = self._block(path)
            if block is None:
                _log.warning("%s is damaged and computed again", path)
            else:
                blocks[block.number] = block
        return blocks

    def _block(self, path: Path) -> BlockFit | None:
        """A finished block, None where it is not as it was written."""
        head, _, payload = path.read_bytes().partition(b"\n")
        wanted = unsealed(head, self._key)
        if wanted is None or hashlib.sha256(payload).hexdigest() != wanted.get("sha256"):
            return None
        try:
            data = read_tensors(io.BytesIO(payload))
            layers = {name: _fit_from(value) for name, value in data["layers"].items()}
            rounded = None if data["rounded"] is None else Rounded(**data["rounded"])
            return BlockFit(data["number"], layers, rounded)
        except (GraphOptError, KeyError, TypeError, AttributeError, ValueError):
            return None  # sealed by someone who writes something else

    def discard(self) -> None:
        """Delete everything."""
        if self.folder is not None:
            delete_path(self.folder)


def _plain_fit(fitted: LayerFit) -> dict[str, Any]:
    plain = {field.name: getattr(fitted, field.name) for field in fields(LayerFit)}
    return {**plain, "stored": None if fitted.stored is None else fitted.stored.to_state()}


def _fit_from(data: dict[str, Any]) -> LayerFit:
    stored = None if data["stored"] is None else stored_from(data["stored"])
    return LayerFit(**{**data, "stored": stored})
