"""MIL ops that coremltools cannot evaluate, or evaluates wrongly, as functions of numpy values.

Each takes the op's input values by name (arrays, scalars, strings; absent optional inputs left out)
and returns one array or a tuple of arrays. float16 is computed in float32 and rounded by the caller.
"""

from __future__ import annotations

from graphopt.backends.coreml.mil.convolution import CONVOLUTIONS
from graphopt.backends.coreml.mil.indexing import INDEXING
from graphopt.backends.coreml.mil.normalization import NORMS
from graphopt.backends.coreml.mil.pointwise import POINTWISE
from graphopt.backends.coreml.mil.recurrent import RECURRENT
from graphopt.backends.coreml.mil.resize import RESIZING
from graphopt.backends.coreml.mil.values import Rule

__all__ = ["OPS"]

OPS: dict[str, Rule] = CONVOLUTIONS | INDEXING | NORMS | POINTWISE | RECURRENT | RESIZING
