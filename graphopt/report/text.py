"""The tree of a model as text."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from graphopt.report.model import ModelSummary, ModuleInfo, OpInfo

__all__ = ["summary_text"]

_LEGEND = (
    "■ module_name (module_type)   ◆ op_name [op_type]",
    "  in, out: index → op[operand or output], as module_input_spec and module_output_spec count",
    "  reads: operand → op[output];  states: names for op_state_spec;  gives: output → readers",
)


def summary_text(summary: ModelSummary, colorize: bool | None = None) -> str:
    """Legend and tree; colours on a terminal, or as asked."""
    tree = Tree(_title(summary.model, root=True))
    _add(tree, summary.model)
    stream = io.StringIO()
    colours = Console().is_terminal if colorize is None else colorize
    console = Console(
        file=stream, width=160, no_color=not colours, force_terminal=colours, highlight=False
    )
    for line in _LEGEND:
        console.print(line, style="dim" if colours else None, markup=False)
    console.print()
    console.print(tree)
    for state in summary.state:
        console.print(f"state {state}", markup=False)
    if not any(True for _ in summary.model.all_ops()):
        console.print("(no op that can be compressed)")
    return stream.getvalue().rstrip()


def _add(tree: Tree, module: ModuleInfo) -> None:
    for child in module.children():
        _add(tree.add(_title(child)), child)
    for op in module.ops:
        tree.add(_op(op))


def _title(module: ModuleInfo, *, root: bool = False) -> Text:
    text = Text()
    if not root:
        text.append("■ ", style="bold")
        text.append(module.module_name, style="bold cyan")
        text.append(" ")
    text.append(f"({module.module_type})", style="dim")
    inputs = {
        index: [f"{edge.op.op_name}[{edge.index}]" for edge in edges]
        for index, edges in module.input_ops.items()
    }
    outputs = {
        index: f"{edge.op.op_name}[{edge.index}]" for index, edge in module.output_ops.items()
    }
    text.append(f"\n  in:  {_listed(inputs)}\n  out: {_listed(outputs)}")
    return text


def _op(op: OpInfo) -> Text:
    text = Text("◆ ", style="bold")
    text.append(op.op_name, style="bold green")
    text.append(f" [{op.op_type or '?'}]")
    reads = {
        place: f"{edge.op.op_name}[{edge.output_idx}]"
        for place, edge in enumerate(edge for edge in op.inputs if not edge.op.is_state)
    }
    states = [edge.op.op_name.rpartition(".")[2] for edge in op.inputs if edge.op.is_state]
    text.append(f"\n  reads:  {_listed(reads)}")
    if states:
        text.append(f"\n  states: {', '.join(states)}")
    gives = {place: [reader.op_name for reader in readers] for place, readers in op.outputs.items()}
    text.append(f"\n  gives:  {_listed(gives)}")
    if op.source_frames:
        frame = _own_frame(op)
        text.append(f"\n  at:     {frame[0]}:{frame[1]}  {frame[2]}", style="dim")
    return text


def _own_frame(op: OpInfo) -> tuple[str, int, str]:
    """The innermost line that is not torch's own."""
    own = [frame for frame in op.source_frames if "/torch/" not in frame.filename]
    frame = (own or list(op.source_frames))[-1]
    return Path(frame.filename).name, frame.lineno, frame.code_context


def _listed(values: Mapping[int, object]) -> str:
    parts = []
    for index, value in values.items():
        shown = f"[{', '.join(value)}]" if isinstance(value, list) else str(value)
        parts.append(f"{index} → {shown}")
    return "; ".join(parts) or "-"
