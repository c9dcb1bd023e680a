"""Ops that torch's exporter has not, or not right: rules for `run_decompositions`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphopt.backends.onnx.own_nodes import rules

__all__ = ["decompositions", "rewritten_ops"]

_aten = torch.ops.aten
Table = dict[Any, Callable[..., Any]]


def decompositions() -> Table:
    """The table for `run_decompositions`; ops that are not in it stay whole."""
    return _REWRITTEN | rules()


def rewritten_ops() -> frozenset[Any]:
    """Ops that this module has rules for; some for certain arguments only."""
    return frozenset(_REWRITTEN)


_REWRITTEN: Table = {}
