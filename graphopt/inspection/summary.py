"""Summaries of programs for people and machines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from rich.tree import Tree

from graphopt.lookups import find_lookups
from graphopt.program import Program
from graphopt.weights import WeightTensor, find_weights, module_frames

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
        bits_per_weight: Stored bits per element of the palettized part, None without one.
    """

    name: str
    type: str
    ops: tuple[tuple[str, str], ...]
    parameters: int
    stored_bytes: int
    bits_per_weight: float | None


@dataclass(frozen=True)
class ModelReport:
    """A program's modules and totals; prints as a tree and a table."""

    source: str
    modules: tuple[ModuleRow, ...]
    parameters: int
    stored_bytes: int
    palettized: int
    static_dims: tuple[str, ...]

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
    """Summarise a program, compressed or not."""
    gm = program.graph_module
    types: dict[str, str] = {}
    for node in gm.graph.nodes:
        for frame in module_frames(node):
            types.setdefault(frame.name, frame.type)
    dense = {lookup.name: lookup for lookup in find_lookups(gm)}
    ops: dict[str, dict[str, str]] = {}
    elements: dict[str, int] = {}
    stored: dict[str, int] = {}
    packed_bits: dict[str, int] = {}
    packed_elements: dict[str, int] = {}
    for weight in find_weights(gm):
        owner = _owner(weight)
        types.setdefault(owner, "")
        size = weight.tensor.numel() * weight.tensor.element_size()
        stored[owner] = stored.get(owner, 0) + size
        for use in weight.uses:
            inside = use.frames[-1].name if use.frames else ""
            ops.setdefault(inside, {})[use.node] = use.op_types[0]
        base = weight.name.removesuffix("_indices")
        if base in dense:
            count = _product(dense[base].shape)
            packed_elements[owner] = packed_elements.get(owner, 0) + count
            packed_bits[owner] = packed_bits.get(owner, 0) + _stored_bits(gm, base)
            stored[owner] += _stored_bits(gm, base) // 8 - size
            elements[owner] = elements.get(owner, 0) + count
        else:
            elements[owner] = elements.get(owner, 0) + weight.tensor.numel()
    rows = tuple(
        ModuleRow(
            name, types[name], tuple(ops.get(name, {}).items()), elements.get(name, 0),
            stored.get(name, 0),
            packed_bits[name] / packed_elements[name] if packed_elements.get(name) else None,
        )
        for name in sorted(types, key=_natural)
    )  # fmt: skip
    tensors = {id(t): t for t in [*gm.parameters(), *gm.buffers()]}.values()
    total_bytes = sum(t.numel() * t.element_size() for t in tensors)
    parameters = sum(t.numel() for t in gm.parameters()) + sum(
        _product(lookup.shape) for lookup in dense.values()
    )
    return ModelReport(
        program.provenance.source, rows, parameters, total_bytes, len(dense),
        program.provenance.static_dims,
    )  # fmt: skip


def _owner(weight: WeightTensor) -> str:
    return weight.name.rpartition(".")[0]


def _product(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _stored_bits(gm: torch.fx.GraphModule, base: str) -> int:
    suffixes = ("_indices", "_lut", "_lut_scale", "_lut_offset", "_channel_scale",
                "_outliers", "_outlier_mask")  # fmt: skip
    buffers = dict(gm.named_buffers())
    found = [buffers[base + suffix] for suffix in suffixes if base + suffix in buffers]
    return sum(8 * tensor.numel() * tensor.element_size() for tensor in found)


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".") if part]


def _nearest_parent(name: str, known: dict[str, Tree]) -> str:
    parent = name.rpartition(".")[0]
    while parent and parent not in known:
        parent = parent.rpartition(".")[0]
    return parent
