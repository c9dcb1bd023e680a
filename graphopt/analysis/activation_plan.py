"""What a plan of activations is made of: ops with what belongs to them, requests, and the plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.config.selection import OpUse
from graphopt.extras import deferred
from graphopt.ir.annotations import ActivationPoint
from graphopt.ir.op_info import OpInfo
from graphopt.specs import QuantizationSpec

if TYPE_CHECKING:
    import networkx as nx
else:
    nx = deferred("networkx")

__all__ = ["ActivationPlan", "Match", "PlannedValue", "Request", "connected", "overruled"]


@dataclass(frozen=True)
class Match:
    """An op with what is computed together with it.

    Attributes:
        node: The op.
        info: What it is.
        output: The node that gives the result: the op, its batch norm's item, or its activation.
        norm: The batch norm behind it, if any.
        use: How configs see it.
    """

    node: fx.Node
    info: OpInfo
    output: fx.Node
    norm: fx.Node | None
    use: OpUse


@dataclass(frozen=True)
class Request:
    """What one op or module boundary asks for a value."""

    spec: QuantizationSpec
    rank: tuple[int, int]
    path: str
    order: int


@dataclass
class PlannedValue:
    """A value and all that is asked for it."""

    output: Request | None = None
    inputs: dict[tuple[fx.Node, int], Request] = field(default_factory=dict)
    derived: bool = False  # only hands on the scale of another value

    def requests(self) -> list[Request]:
        """What decides its scale."""
        own = [] if self.output is None or self.derived else [self.output]
        return [*own, *self.inputs.values()]


@dataclass(frozen=True)
class ActivationPlan:
    """Where activations are quantized.

    Attributes:
        outputs: Node → its point, for all users.
        inputs: (node, operand position) → the point of that operand for that node alone.
        matches: Ops that were considered.
        floats: (node, op type, why) of every value that stays in float for some reader.
        remarks: Requests that another overruled.
    """

    outputs: dict[fx.Node, ActivationPoint]
    inputs: dict[tuple[fx.Node, int], ActivationPoint]
    matches: tuple[Match, ...]
    floats: tuple[tuple[str, str, str], ...]
    remarks: tuple[str, ...]


def overruled(name: str, chosen: Request, requests: list[Request]) -> Iterator[str]:
    """Requests that ask for something else than the one that holds, as remarks."""
    seen = {chosen.spec}
    for request in requests:
        if request.spec in seen:
            continue
        seen.add(request.spec)
        yield (
            f"{name}: {request.path} asks for {_short(request.spec)}, but {chosen.path} holds for all that"
            f" share its scale ({_short(chosen.spec)})"
        )


def _short(spec: QuantizationSpec) -> str:
    dtype = str(spec.dtype).removeprefix("torch.")
    return f"{dtype} {spec.qscheme.value} {spec.granularity.type}"


def connected(values: Iterable[fx.Node], paths: Iterable[list[fx.Node]]) -> Iterator[set[fx.Node]]:
    """Values that chains of shared scales connect."""
    sharing: Any = nx.Graph()
    sharing.add_nodes_from(values)
    for path in paths:
        nx.add_path(sharing, path)
    yield from nx.connected_components(sharing)
