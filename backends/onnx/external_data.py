"""Weights in a file beside a model that one message of protobuf cannot hold."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from pathlib import Path

from graphopt.files import alone_in, remove_leftovers

_log = logging.getLogger(__name__)
__all__ = ["data_of", "settle_data"]

_LONGEST = 250  # bytes of a model's name to which ".data" can be added


def data_of(path: Path) -> Path:
    """Where the weights of a model lie that are not in it: beside the file, where `path` is a link."""
    place = Path(os.path.realpath(path))
    name = os.fsencode(place.name)
    if len(name) > _LONGEST:
        digest = hashlib.sha256(name).hexdigest()[:12]
        return place.with_name(f"{name[:200].decode(errors='ignore')}-{digest}.data")
    return place.with_name(f"{place.name}.data")


def settle_data(path: Path, written: Path | None) -> None:
    """Give the weights of a model that was just written the name that goes with the model's.

    A model that is whole stands at `path` all the time. Where another writer's has taken the place
    already, its data stay as they are. Where the data cannot get their name they keep the other one.

    Args:
        path: The model.
        written: The file that it reads its weights from, in the same folder; None where it has none.
    """
    place, target = Path(os.path.realpath(path)), data_of(path)
    if written is None and not target.exists():
        remove_leftovers(place, f"{place.suffix}.data")
        return
    with alone_in(place.parent):
        named = _locations(place)
        if written is None:
            if not named:
                target.unlink(missing_ok=True)
        elif written.name not in named:
            written.unlink(missing_ok=True)
            return
        elif _renamed(place, written, target):
            written.unlink(missing_ok=True)
    if written is None or not written.exists():
        remove_leftovers(place, f"{place.suffix}.data")


def _locations(place: Path) -> set[str]:
    """Names of the files that a model reads weights from."""
    import onnx

    model = onnx.load(place, load_external_data=False)
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    return {entry.value for entry in entries if entry.key == "location"}


def _renamed(place: Path, written: Path, target: Path) -> bool:
    """Let the model at `place` read `target`, which gets the content of `written`."""
    import onnx

    temporary = written.with_name(written.name.removesuffix(".data"))
    try:
        target.unlink(missing_ok=True)
        try:
            os.link(written, target)
        except OSError:
            shutil.copyfile(written, target)
        model = onnx.load(place, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = target.name
        onnx.save(model, temporary)
        os.replace(temporary, place)
    except OSError as error:
        for path in (temporary, target):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        _log.warning("%s reads its weights from %s: %s", place, written.name, error)
        return False
    return True
