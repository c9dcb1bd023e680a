"""The file of a sensitivity table: a header, then one line per measurement, only ever appended to."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.audited import Limits, parse_json
from graphopt.errors import InputError
from graphopt.run.batches import Batch
from graphopt.run.record_file import RecordFile
from graphopt.search.mixed_precision.candidates import Candidate
from graphopt.search.mixed_precision.layers import Layer

__all__ = ["Header", "Records", "Vectors", "batch_hash"]

_FORMAT = "graphopt sensitivity table"
_VERSION = 2
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Header:
    """What a table is about; two tables with different headers do not mix.

    Attributes:
        fingerprint: Hash of the graph.
        weights: Hash of all tensors.
        metrics: Names of the metrics, the first deciding.
        scores: What the metrics compute, as `content_hash` tells it; "" for those of the library.
        mode: "exact", "fast" or "hybrid".
        correction: What is corrected afterwards, or None.
        draws: Random directions per sample of the fast mode.
        group: Samples of a vector of the fast mode.
        seed: Seed of vector tables and directions.
        sizes: Settings of the size model.
        rest_bits: Stored bits of everything that no candidate is for.
        candidates: Candidates by name.
        layers: Layers in the order of the graph.
        lowering: Options of the target that the sizes are for.
    """

    fingerprint: str
    weights: str
    metrics: tuple[str, ...]
    scores: tuple[str, ...]
    mode: str
    correction: str | None
    draws: int
    group: int
    seed: int
    sizes: dict[str, str | None]
    rest_bits: int
    candidates: dict[str, Candidate]
    layers: tuple[Layer, ...]
    lowering: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        plain = {
            key: value
            for key, value in vars(self).items()
            if key not in ("candidates", "layers", "metrics", "scores")
        }
        return {
            "format": _FORMAT,
            "version": _VERSION,
            **plain,
            "metrics": list(self.metrics),
            "scores": list(self.scores),
            "candidates": {
                name: candidate.to_dict() for name, candidate in self.candidates.items()
            },
            "layers": [asdict(layer) for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Header:
        """Read plain values."""
        layers = tuple(_layer(layer) for layer in data["layers"])
        rest = {key: data[key] for key in cls.__dataclass_fields__ if key in data}
        rest |= {
            "layers": layers,
            "metrics": tuple(data["metrics"]),
            "scores": tuple(data["scores"]),
            "candidates": {
                name: Candidate.from_dict(name, spec) for name, spec in data["candidates"].items()
            },
        }
        return cls(**rest)

    def difference(self, other: Mapping[str, Any]) -> str:
        """What differs in the plain values of another header, in the user's words."""
        words = {
            "fingerprint": "the model's graph",
            "weights": "the model's weights",
            "scores": "what the metric computes",
            "layers": "layers or their candidates",
            "sizes": "the size model (backend, dtypes)",
            "lowering": "options of the target",
        }
        mine = parse_json(json.dumps(self.to_dict()), "header", Limits(1 << 30, 64, 10_000_000))
        absent: dict[str, Any] = {"lowering": {}}  # of files from before there was any
        differing = [key for key in mine if mine[key] != other.get(key, absent.get(key))]
        return ", ".join(words.get(key, key) for key in differing)


def _layer(data: Mapping[str, Any]) -> Layer:
    lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
    return Layer(**{**data, **lists})


@dataclass
class Records:
    """Measurements, in memory and, where there is a path, on disk.

    Attributes:
        header: What they are about.
        path: The file, or None.
        values: (batch, layer) → candidate → metric → value.
        vectors: Batch → vectors of the fast mode.
        hashes: Batch → hash of its inputs.
        missed: (batch, layer) where the batch does not reach the layer.
    """

    header: Header
    path: Path | None = None
    values: dict[tuple[int, str], dict[str, dict[str, float]]] = field(default_factory=dict)
    vectors: dict[int, Vectors] = field(default_factory=dict)
    hashes: dict[int, str] = field(default_factory=dict)
    missed: set[tuple[int, str]] = field(default_factory=set)
    file: RecordFile | None = None

    @classmethod
    def open(cls, header: Header, path: Path | None, *, resume: bool) -> Records:
        """Begin a file, or go on with one.

        Raises:
            InputError: The file belongs to another model, or to other candidates or settings.
        """
        if path is None:
            return cls(header)
        file = RecordFile(path, header.to_dict())
        records = cls(header, path, file=file)
        if resume:
            records._take(path, file.resume(header.difference))
        else:
            file.begin()
        return records

    @classmethod
    def load(cls, path: Path) -> Records:
        """Read a file.

        Raises:
            InputError: It is no table.
        """

        def read(head: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Records:
            records = cls(Header.from_dict(head), path)
            records._take(path, lines)
            return records

        return RecordFile.read(path, _FORMAT, _VERSION, read)

    def _take(self, path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        try:
            for line in lines:
                self._take_line(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not a sensitivity table: {error}") from None

    def _take_line(self, line: Mapping[str, Any]) -> None:
        number = int(line["batch"])
        self.hashes[number] = line["data"]
        if "vectors" in line:
            raw = np.frombuffer(base64.b64decode(line["vectors"]), dtype="<f4")
            self.vectors[number] = raw.reshape(line["shape"]).astype(np.float32)
            return
        values = {
            name: {metric: float(value) for metric, value in by_metric.items()}
            for name, by_metric in line["values"].items()
        }
        self.values[number, str(line["layer"])] = values
        if line.get("missed"):
            self.missed.add((number, line["layer"]))

    def check_batch(self, number: int, digest: str) -> None:
        """Note the hash of a batch.

        Raises:
            InputError: Another batch was measured under this number.
        """
        if self.hashes.setdefault(number, digest) != digest:
            raise InputError(
                f"{self.path or 'the table'}: batch {number} was measured on other data; give the"
                " same data, or begin anew (resume=False, --restart)"
            )

    def add(
        self,
        batch: int,
        layer: str,
        values: Mapping[str, Mapping[str, float]],
        *,
        missed: bool = False,
    ) -> None:
        """Take in one layer's values on one batch, and whether the batch misses the layer."""
        self.values[batch, layer] = {name: dict(by_metric) for name, by_metric in values.items()}
        line = {"batch": batch, "data": self.hashes[batch], "layer": layer, "values": values}
        if missed:
            self.missed.add((batch, layer))
            line["missed"] = True
        self._append(line)

    def add_vectors(self, batch: int, vectors: Vectors) -> None:
        """Take in one batch's vectors."""
        self.vectors[batch] = vectors
        text = base64.b64encode(np.ascontiguousarray(vectors, dtype="<f4").tobytes()).decode()
        line = {"batch": batch, "data": self.hashes[batch], "shape": vectors.shape, "vectors": text}
        self._append(line)

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.file is not None:
            self.file.append(line)


def batch_hash(batch: Batch) -> str:
    """Hash of a call's inputs."""
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(_bytes(leaf))
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
