"""What a run has finished, in a folder beside its results, so that it can go on after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import InputError
from graphopt.files import delete_path, replaced
from graphopt.schemes.registry import stored_from
from graphopt.search.mixed_precision.layers import weights_of
from graphopt.search.mixed_precision.records import batch_hash, weights_hash
from graphopt.search.rdo.layer_fit import LayerFit
from graphopt.search.rdo.rounding import Rounded
from graphopt.search.rdo.session import BlockFit, Session

__all__ = ["RunState", "key_of"]


def key_of(session: Session) -> str:
    """Hash of everything that decides the outcome: graph, weights, data, config, version of torch."""
    digest = hashlib.sha256(session.exact.fingerprint().encode())
    weights = [weight.tensor for weight in weights_of(session.exact.graph_module)]
    digest.update(weights_hash(weights).encode())
    for batch in session.batches:
        digest.update(batch_hash(batch).encode())
    digest.update(session.config.to_yaml().encode())
    digest.update(torch.__version__.encode())
    return digest.hexdigest()


class RunState:
    """Finished stages and blocks of one run.

    Args:
        folder: Where they are kept; None keeps nothing.
        key: From `key_of`.
        resume: Go on with what is there; False begins anew.

    Raises:
        InputError: What is there belongs to another model, other data or another config.
    """

    def __init__(self, folder: Path | None, key: str, *, resume: bool) -> None:
        self.folder = folder
        if folder is None:
            return
        if not resume or not (folder / "key").exists():
            delete_path(folder)
        if folder.exists():
            if (folder / "key").read_text() != key:
                raise InputError(
                    f"{folder} holds an unfinished run of another model, other data or another"
                    " config; finish that one, delete the folder, or begin anew (resume=False, --restart)"
                )
            return
        folder.mkdir(parents=True)
        (folder / "key").write_text(key)

    @property
    def sensitivities(self) -> Path | None:
        """File of the sensitivity table."""
        return None if self.folder is None else self.folder / "sensitivities.jsonl"

    def read(self, name: str) -> Any:
        """The outcome of a stage, or None."""
        path = None if self.folder is None else self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path is not None and path.exists() else None

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep the outcome of a stage: plain values."""
        if self.folder is None:
            return
        target = self.folder / f"{name}.json"
        with replaced(target) as temporary:
            temporary.write_text(json.dumps(value))

    def add_block(self, block: BlockFit) -> None:
        """Keep a finished block."""
        if self.folder is None:
            return
        target = self.folder / f"block{block.number}.pt"
        layers = {name: _plain_fit(fitted) for name, fitted in block.layers.items()}
        rounded = None if block.rounded is None else {**asdict(block.rounded), "fitted": {}}
        with replaced(target) as temporary:
            torch.save({"number": block.number, "layers": layers, "rounded": rounded}, temporary)

    def blocks(self) -> dict[int, BlockFit]:
        """Finished blocks by number."""
        blocks: dict[int, BlockFit] = {}
        for path in [] if self.folder is None else self.folder.glob("block*.pt"):
            data = torch.load(path, weights_only=True)
            layers = {name: _fit_from(value) for name, value in data["layers"].items()}
            rounded = None if data["rounded"] is None else Rounded(**data["rounded"])
            blocks[data["number"]] = BlockFit(data["number"], layers, rounded)
        return blocks

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
