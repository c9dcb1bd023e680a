"""The translations of torch's exporter, read once: that takes longer than most exports."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from graphopt.backends.quiet import quiet
from graphopt.exclusive import patched
from graphopt.extras import require
from graphopt.ir.torch_private import part_of_torch

__all__ = ["OPSET", "read_once", "translations"]

OPSET = 23


@functools.cache
def translations() -> Any:
    """Torch's registry of translations, which is not to be changed.

    Raises:
        MissingDependencyError: onnxscript is not installed, or torch keeps them elsewhere.
    """
    require("onnxscript", "onnx")
    kind = part_of_torch(
        "translations to ONNX", "torch.onnx._internal.exporter._registration", "ONNXRegistry"
    )
    with quiet("torch.onnx"):
        return kind.from_torchlib(OPSET)


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Inside, torch's exporter takes copies of what has been read."""
    whole = translations()
    kind = type(whole)

    def copied(opset_version: int = OPSET) -> Any:
        made = kind()
        made._opset_version = opset_version
        made.functions = {op: list(forms) for op, forms in whole.functions.items()}
        return made

    with patched(kind, from_torchlib=staticmethod(copied)):
        yield
