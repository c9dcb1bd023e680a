"""Programs with complex numbers for targets that have none."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.backends.capabilities import ComplexNumbers
from graphopt.backends.complex_parts import ComplexAsParts, is_complex
from graphopt.backends.fourier import NoPartsError
from graphopt.ir import torch_private
from graphopt.ir.program import Program
from graphopt.ir.state import state_nodes
from graphopt.passes.pass_manager import run_passes
from graphopt.run.interpreter import Interpreter, Value

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
    for is_open in (True, False):
        legal = program.copy()
        try:
            if not is_open:
                _with_sizes(legal)
            run_passes(legal.graph_module, [ComplexAsParts()])
        except NoPartsError as error:
            _log.debug("%s", error)
        else:
            return legal
    return program


def _with_sizes(program: Program) -> None:
    """Give every value the sizes that it has in the example, where they are open.

    Raises:
        NoPartsError: They depend on data.
    """
    walk = Interpreter(program.graph_module, copies=True)
    mode = torch_private.FakeTensorMode(allow_non_fake_inputs=True)

    def faked(value: Any) -> Any:
        is_real = isinstance(value, Tensor) and not isinstance(value, torch_private.FakeTensor)
        return mode.from_tensor(value) if is_real else value

    def computed(node: fx.Node, value: Value) -> Any:
        with mode:
            result = walk.call(node, value)
        return pytree.tree_map(faked, result)

    inputs = walk.inputs((program.example_args, program.example_kwargs))
    values = {node: faked(value) for node, value in inputs.items()}
    try:
        walk.walk(walk.computed, values, call=computed)
    except Exception as error:
        raise NoPartsError(f"sizes of the example: {error}") from error
    for node, value in values.items():
        node.meta["val"] = value


def _is_made(node: fx.Node) -> bool:
    """Whether a complex value comes neither from a transform of real ones nor from another value."""
    if str(node.target) in _REAL_TRANSFORMS:
        return False
    made = node.op == "get_attr" or not any(is_complex(x.meta["val"]) for x in node.all_input_nodes)
    return made or str(node.target) == "aten._fft_c2c.default"
