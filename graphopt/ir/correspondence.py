"""Which nodes of two graphs stand for one another: a graph and what compression made of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

__all__ = ["Correspondence"]


@dataclass(frozen=True, eq=False)
class Correspondence(Mapping[fx.Node, fx.Node]):
    """Nodes of a first graph → their partners in a second one.

    Several nodes of the first graph may have one partner: an op, and what rounds its output. What was
    put into one of the graphs alone (tables, scales, quantizers of weights) has none.

    Attributes:
        first: The graph that is asked about, usually the compressed one.
        second: The one that answers, usually the exact one.
        partners: Node of the first → node of the second, in the order of the first.
    """

    first: fx.Graph
    second: fx.Graph
    partners: dict[fx.Node, fx.Node]

    @classmethod
    def by_name(
        cls,
        first: fx.GraphModule,
        second: fx.GraphModule,
        *,
        stands_for: Callable[[fx.Node], fx.Node | None] | None = None,
    ) -> Correspondence:
        """Nodes of one kind and name, which copies and passes keep.

        Args:
            first: One graph.
            second: The other.
            stands_for: For a node that calls a module, the node whose partner it shares, or None;
                without it such nodes have no partners.
        """
        named = {node.name: node for node in second.graph.nodes}
        partners: dict[fx.Node, fx.Node] = {}
        for node in first.graph.nodes:
            if node.op == "call_module":
                wrapped = None if stands_for is None else stands_for(node)
                partner = None if wrapped is None else partners.get(wrapped)
            else:
                partner = named.get(node.name)
                partner = None if partner is None or partner.op != node.op else partner
            if partner is not None:
                partners[node] = partner
        return cls(first.graph, second.graph, partners)

    @classmethod
    def of_copy(cls, first: fx.GraphModule, second: fx.GraphModule) -> Correspondence:
        """All nodes in order; nodes that call modules have partners, too.

        Args:
            first: A copy of `second`, or what `second` is a copy of; neither was changed since.
            second: The other.

        Raises:
            ValueError: They have different numbers of nodes.
        """
        pairs = zip(first.graph.nodes, second.graph.nodes, strict=True)
        return cls(first.graph, second.graph, dict(pairs))

    @classmethod
    def by_place(
        cls,
        first: fx.GraphModule,
        second: fx.GraphModule,
        place: Callable[[fx.Node], Hashable | None],
    ) -> Correspondence:
        """The n-th nodes at equal places, where names cannot be trusted: graphs captured apart.

        Args:
            first: One graph.
            second: The other.
            place: Where a node stands; None leaves it without a partner.
        """
        others = _numbered(second, place)
        partners = {
            node: others[key] for key, node in _numbered(first, place).items() if key in others
        }
        return cls(first.graph, second.graph, partners)

    def __getitem__(self, node: fx.Node) -> fx.Node:
        return self.partners[node]

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self.partners)

    def __len__(self) -> int:
        return len(self.partners)

    def back(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes of the first graph that stand for one of the second, in order."""
        return tuple(mine for mine, theirs in self.partners.items() if theirs is node)

    def without_partner(self) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
        """Nodes of the first and of the second graph that nothing in the other one stands for."""
        reached = set(self.partners.values())
        return (
            tuple(node for node in self.first.nodes if node not in self.partners),
            tuple(node for node in self.second.nodes if node not in reached),
        )


def _numbered(
    gm: fx.GraphModule, place: Callable[[fx.Node], Hashable | None]
) -> dict[tuple[Hashable, int], fx.Node]:
    """Nodes by their place and their number there."""
    counts: dict[Hashable, int] = {}
    numbered: dict[tuple[Hashable, int], fx.Node] = {}
    for node in gm.graph.nodes:
        where = place(node)
        if where is not None:
            counts[where] = counts.get(where, -1) + 1
            numbered[where, counts[where]] = node
    return numbered
