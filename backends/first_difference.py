"""Which op of a program it is that a target computes otherwise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from graphopt.backends.interface import with_outputs
from graphopt.ir.module_frames import module_frames
from graphopt.ir.program import Program
from graphopt.run.interpreter import Interpreter

__all__ = ["first_difference"]


def first_difference(program: Program, differs: Callable[[Program], bool | None]) -> str | None:
    """Describe the first op, in the graph's order, whose value a target computes otherwise.

    The graph is cut behind an op, with every value that is read behind the cut as an output, and the
    cut is moved by bisection: once a value is wrong, something behind it is.

    Args:
        program: The whole program, in our vocabulary.
        differs: Whether a program's outputs on the target differ from PyTorch's; None where it
            cannot be lowered or evaluated.

    Returns:
        Op, node and module; None where no part of the program differs.
    """
    interpreter = Interpreter(program.graph_module)
    ops = [node for node in interpreter.nodes if _is_value(node, interpreter)]
    low, high = -1, len(ops)
    while high - low > 1:
        middle = (low + high) // 2
        part = with_outputs(program, _live(ops, middle, interpreter))
        if differs(part):
            high = middle
        else:
            low = middle
    return _described(ops[high]) if high < len(ops) else None


def _is_value(node: fx.Node, interpreter: Interpreter) -> bool:
    if node.op not in ("call_function", "call_module", "call_method"):
        return False
    value = node.meta.get("val")
    if node in interpreter.constant or not isinstance(value, Tensor):
        return False
    # codes of rounded values are no interface; what they stand for is looked at behind them
    return value.dtype not in (torch.int8, torch.uint8)


def _live(ops: list[fx.Node], last: int, interpreter: Interpreter) -> list[str]:
    """Names of the values up to an op that something behind it reads, and of its own."""
    place = interpreter.place[ops[last]]
    behind = interpreter.place
    return [
        node.name
        for node in ops[: last + 1]
        if node is ops[last] or any(behind[user] > place for user in node.users)
    ]


def _described(node: fx.Node) -> str:
    frames = [frame.name for frame in module_frames(node) if frame.name]
    where = f" of module {frames[-1]!r}" if frames else ""
    lines = str(node.meta.get("stack_trace", "")).strip().splitlines()
    files = [line.strip() for line in lines if line.strip().startswith("File ")]
    return f"{node.target} ({node.name}){where}{f', {files[-1]}' if files else ''}"
