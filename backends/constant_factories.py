"""Windows and the like, which depend on numbers alone, as stored values."""

from __future__ import annotations

from torch import Tensor, fx

from graphopt.ir.editor import Editor

__all__ = ["store_constant_factories"]

# small tables of numbers that converters have no op for; what fills memory (zeros, ranges) stays an op
_FACTORIES = frozenset(
    f"aten::{name}"
    for name in (
        *("hann_window", "hamming_window", "blackman_window", "bartlett_window", "kaiser_window"),
        *("fft_fftfreq", "fft_rfftfreq", "tril_indices", "triu_indices", "logspace"),
    )
)


def store_constant_factories(edit: Editor) -> None:
    """Compute windows, frequencies and indices of triangles whose sizes are known, once."""
    for node in list(edit.gm.graph.nodes):
        if node.op == "call_function" and _is_factory(node) and not node.all_input_nodes:
            value = node.target(*node.args, **node.kwargs)
            assert isinstance(value, Tensor)
            edit.replace(node, edit.constant(node.name, value, like=node))


def _is_factory(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name in _FACTORIES
