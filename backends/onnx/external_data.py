"""Weights in a file beside a model that one message of protobuf cannot hold."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from graphopt.files import replaced

__all__ = ["data_of", "name_data"]


def data_of(path: Path) -> Path:
    """Where the weights of a model lie that are not in it."""
    return path.with_name(f"{path.name}.data")


def name_data(path: Path, written: Path) -> None:
    """Give the weights of a model the name that goes with the model's.

    A model that is whole stands at `path` all the time.

    Args:
        path: The model.
        written: The file that it reads its weights from, in the same folder.
    """
    import onnx

    target = data_of(path)
    target.unlink(missing_ok=True)
    try:
        os.link(written, target)
    except OSError:
        shutil.copyfile(written, target)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = target.name
    with replaced(path) as temporary:
        onnx.save(model, temporary)
