"""Programs with complex numbers for targets that have none."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree
from typing_extensions import override

from graphopt.backends.capabilities import ComplexNumbers
from graphopt.backends.complex_parts import ComplexAsParts, is_complex
from graphopt.backends.fourier import NoPartsError
from graphopt.ir import torch_private
from graphopt.ir.program import Program
from graphopt.ir.state import state_nodes
from graphopt.passes.pass_manager import run_passes

__all__ = ["in_real_parts"]

_log = logging.getLogger(__name__)
# what makes complex numbers of real ones in converters and runtimes that have no more of them
_REAL_TRANSFORMS = ("aten._fft_r2c.default", "aten.fft_rfft.default", "aten.stft.default")


def in_real_parts(program: Program, held: ComplexNumbers) -> Program:
    """A copy of a program that computes with real numbers, if some of it is complex.

    Args:
        program: It is not changed; it is what comes back where nothing is complex, where its inputs,
            outputs or states are, and where an op is not known on parts.
        held: The target's `Capabilities.complex_numbers`; what it has stays as it is.
    """
    if held == "all":
        return program
    graph = program.graph_module.graph
    nodes = [node for node in graph.nodes if is_complex(node.meta.get("val"))]
    if not nodes or (held == "transforms" and not any(map(_is_made, nodes))):
        return program
    states = {*state_nodes(program.graph_module), *graph.output_node().all_input_nodes}
    if any(node.op == "placeholder" or node in states for node in nodes):
        return program
    for sizes in (None, (*program.example_args, *program.example_kwargs.values())):
        legal = program.copy()
        try:
            if sizes is not None:
                _with_sizes(legal.graph_module, pytree.tree_leaves(sizes))
            run_passes(legal.graph_module, [ComplexAsParts()])
        except NoPartsError as error:
            _log.debug("%s", error)
        else:
            return legal
    return program


def _with_sizes(gm: fx.GraphModule, leaves: Sequence[Any]) -> None:
    try:
        _Sizes(gm).give(leaves)
    except Exception as error:
        raise NoPartsError(f"sizes of the example: {error}") from error


class _Sizes(fx.Interpreter):
    """Gives every value the sizes that it has in the example, where they are open."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._mode = torch_private.FakeTensorMode(allow_non_fake_inputs=True)

    def give(self, leaves: Sequence[Any]) -> None:
        """Take these as inputs.

        Args:
            leaves: The example's.
        """
        given = [self._mode.from_tensor(x) if isinstance(x, Tensor) else x for x in leaves]
        with self._mode:
            self.run(*given, enable_io_processing=False)

    @override
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = self._mode.from_tensor(value)
        n.meta["val"] = value
        return value


def _is_made(node: fx.Node) -> bool:
    """Whether a complex value comes neither from a transform of real ones nor from another value."""
    if str(node.target) in _REAL_TRANSFORMS:
        return False
    made = node.op == "get_attr" or not any(is_complex(x.meta["val"]) for x in node.all_input_nodes)
    return made or str(node.target) == "aten._fft_c2c.default"
