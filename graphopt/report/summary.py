"""Summaries of programs for people and machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.tree import Tree

from graphopt.analysis.stored_values import find_lookups
from graphopt.analysis.weights import find_weights
from graphopt.ir.module_frames import module_frames
from graphopt.ir.program import Program
from graphopt.report.bits import StoredTensor, stored_tensors

__all__ = ["ModelReport", "ModuleRow", "inspect_program"]


@dataclass(frozen=True)
class ModuleRow:
    """One module of a program.

    Attributes:
        name: Name for `module_name_configs`.
        type: Class for `module_type_configs`.
        ops: (node name for `op_name_config`, type for `op_type_config`) of its own ops with state.
        parameters: Elements of the state that its own ops use.
        stored_bytes: Bytes of that state as it is stored.
        bits_per_weight: Stored bits per element of the compressed part, None without one.

    Examples:
        >>> rows = graphopt.inspection.inspect_program(program).modules
        >>> isinstance(rows[0], ModuleRow), rows[1].name, rows[1].parameters
        (True, '0', 136)
    """

    name: str
    type: str
    ops: tuple[tuple[str, str], ...]
    parameters: int
    stored_bytes: int
    bits_per_weight: float | None


@dataclass(frozen=True)
class ModelReport:
    """A program's modules and totals; prints as a tree and a table.

    Examples:
        >>> report = graphopt.inspection.inspect_program(program)
        >>> isinstance(report, ModelReport), report.parameters, report.stored_bytes
        (True, 172, 688)
    """

    source: str
    modules: tuple[ModuleRow, ...]
    parameters: int
    stored_bytes: int
    palettized: int
    static_dims: tuple[str, ...]
    state: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def tree(self) -> Tree:
        """The module tree with the ops that hold state."""
        root = Tree(f"{self.source}")
        branches = {"": root}
        for row in self.modules:
            parent = branches[_nearest_parent(row.name, branches)]
            label = f"[bold]{row.name or '(root)'}[/bold] [dim]{row.type}[/dim]"
            branch = root if row.name == "" else parent.add(label)
            branches[row.name] = branch
            for node, kind in row.ops:
                branch.add(f"{node} [cyan]{kind}[/cyan]")
        return root

    def table(self) -> Table:
        """Size of each module that holds state."""
        table = Table(title=f"{self.parameters:,} parameters, {self.stored_bytes / 1024:,.1f} KiB")
        for heading in ("module", "parameters", "KiB", "bits/weight"):
            table.add_column(heading, justify="left" if heading == "module" else "right")
        for row in self.modules:
            if row.parameters:
                bits = "" if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}"
                size = f"{row.stored_bytes / 1024:.2f}"
                table.add_row(row.name or "(root)", f"{row.parameters:,}", size, bits)
        return table


def inspect_program(program: Program) -> ModelReport:
    """Summarise a program, compressed or not.

    Examples:
        >>> inspect_program(program).parameters
        172
    """
    gm = program.graph_module
    types: dict[str, str] = {}
    for node in gm.graph.nodes:
        for frame in module_frames(node):
            types.setdefault(frame.name, frame.type)
    held = stored_tensors(gm)
    known = {name for name, _ in gm.named_parameters()}
    ops: dict[str, dict[str, str]] = {}
    for weight in find_weights(gm):
        known.update((weight.name, *weight.aliases))
        types.setdefault(weight.name.rpartition(".")[0], "")
        for use in weight.uses:
            inside = use.frames[-1].name if use.frames else ""
            ops.setdefault(inside, {})[use.node] = use.op_types[0]
    modules: dict[str, list[StoredTensor]] = {}
    for name, tensor in held.items():
        if tensor.compressed or name in known:
            modules.setdefault(name.rpartition(".")[0], []).append(tensor)
    rows = tuple(
        _row(name, types.get(name, ""), ops.get(name, {}), modules.get(name, ()))
        for name in sorted({*types, *modules}, key=_natural)
    )
    stored_bits = sum(tensor.bits for tensor in held.values())
    return ModelReport(
        program.provenance.source,
        rows,
        sum(row.parameters for row in rows),
        -(-stored_bits // 8),
        len(find_lookups(gm)),
        program.provenance.static_dims,
        tuple(map(str, program.state)),
    )


def _row(name: str, kind: str, ops: dict[str, str], tensors: Sequence[StoredTensor]) -> ModuleRow:
    packed = [tensor for tensor in tensors if tensor.compressed]
    count = sum(tensor.elements for tensor in packed)
    return ModuleRow(
        name,
        kind,
        tuple(ops.items()),
        sum(tensor.elements for tensor in tensors),
        -(-sum(tensor.bits for tensor in tensors) // 8),
        sum(tensor.bits for tensor in packed) / count if count else None,
    )


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".") if part]


def _nearest_parent(name: str, known: dict[str, Tree]) -> str:
    parent = name.rpartition(".")[0]
    while parent and parent not in known:
        parent = parent.rpartition(".")[0]
    return parent
