"""Plan where activations are quantized: one decision per value, one scale per sharing group.

A value is quantized once. Its producer's output spec and its consumers' input specs are requests for
it, and values that must have one scale are one group. Of several requests in a group the most
specific holds (module name over module type over global, op name over op type over the rest), of
equals the earliest in the graph; every other is reported.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Set
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, fx

from graphopt.analysis.activation_plan import (
    ActivationPlan,
    Match,
    PlannedValue,
    Request,
    connected,
    overruled,
)
from graphopt.analysis.float_readers import LEAVES, FloatReaders, lacking
from graphopt.analysis.value_facts import (
    attention_scores,
    data_values,
    entering_values,
    inside_norm,
    is_float,
    is_pooling,
    leaving_values,
    norm_behind,
    only_user,
    read_by_norms,
    with_known_range,
)
from graphopt.config.selection import ModuleFrame, OpUse, Selection, Selector
from graphopt.errors import ConfigError
from graphopt.ir import op_info
from graphopt.ir.annotations import ActivationPoint
from graphopt.ir.editor import nodes_in, operands
from graphopt.ir.module_frames import module_frames
from graphopt.ir.op_info import OpInfo, Scales
from graphopt.numerics.affine import grid_of
from graphopt.specs import (
    PerBlockGranularity,
    PerChannelGranularity,
    PerTensorGranularity,
    QuantizationSpec,
)

__all__ = ["ActivationPlan", "Match", "plan_activations"]


def plan_activations(
    gm: fx.GraphModule,
    selector: Selector,
    fused: frozenset[str] | None = None,
    *,
    integer_results: bool = False,
    float_ops: frozenset[str] = frozenset(),
) -> ActivationPlan:
    """Plan the activations of a graph.

    Args:
        gm: The graph.
        selector: The config.
        fused: Activation functions that the target computes with the op before; None for all.
        integer_results: Whether the target computes layers with integers only where their results are
            rounded; those of the program then are, and what only a norm reads, its channels balanced.
        float_ops: Names of ops that the target computes in float, unless they read a stored weight.

    Raises:
        ConfigError: A spec has a granularity or class that activations cannot have.
    """
    return _Planner(gm, selector, fused, integer_results, float_ops).plan()


class _Planner:
    def __init__(
        self,
        gm: fx.GraphModule,
        selector: Selector,
        fused: frozenset[str] | None,
        integer_results: bool,
        float_ops: frozenset[str],
    ) -> None:
        self.gm = gm
        self.integer_results = integer_results
        self.selector = selector
        self.fused = fused
        self.order = {node: place for place, node in enumerate(gm.graph.nodes)}
        self.data = data_values(gm)
        self.scores = attention_scores(gm)
        self.normed = read_by_norms(gm, self.data)
        self.in_float = FloatReaders(gm, self.data, self.scores, fused, float_ops, integer_results)
        self.values: dict[fx.Node, PlannedValue] = {}
        self.sharing: list[list[fx.Node]] = []  # values that have one scale
        self.floats: list[tuple[str, str, str]] = []
        self.matches: list[Match] = []

    def plan(self) -> ActivationPlan:
        for node in self.gm.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target is operator.getitem:
                self._pass_on(node, ("getitem",))
            else:
                info = op_info.info_of(node)
                if info is not None and info.scales is not None:
                    self._place(node, info)
        self._module_slots()
        return self._resolve()

    # --- requests -------------------------------------------------------------------------------
    def _place(self, node: fx.Node, info: OpInfo) -> None:
        if info.scales is Scales.PASS:
            self._pass_on(node, op_info.op_names(node))
            return
        match = self._match(node, info)
        places = self._operand_places(match)
        reason = self._why_float(match, places)
        selections = [
            (place, self.selector.select_slot(match.use, "input", names)) for place, names in places
        ]
        out = self.selector.select_slot(match.use, "output", (0, "output"))
        named = out.named_op or any(selection.named_op for _, selection in selections)
        if reason and not named:
            self._note_float(match, reason)
            return
        self.matches.append(match)
        shared = []
        for (operand, position), selection in selections:
            if selection.spec is not None:
                self._request_input(operand, node, position, selection)
                shared.append(operand)
            else:
                self._note_float(match, f"operand {operand.name}: {selection.path}")
        wanted = out.spec if info.quantizes_output or out.named_op else None
        if node in self.scores and not named:
            self._note_float(match, "attention scores, which a softmax reads")
        elif self._only_float(match) and not out.named_op and not self._in_integers(match):
            self._note_float(match, f"result: {self._only_float(match)}")
        elif wanted is not None and is_float(match.output):
            self._request_output(match.output, out)
            shared.append(match.output)
        elif info.quantizes_output:
            self._note_float(match, f"output: {out.path}")
        if info.scales is Scales.SHARE:
            self.sharing.append(shared)

    def _match(self, node: fx.Node, info: OpInfo) -> Match:
        output, norm = node, None
        if info.folds_norm and (item := norm_behind(node)) is not None:
            output, norm = item, item.args[0]
        user = only_user(output)
        if info.scales is Scales.COMPUTE and user is not None and self._is_fused(user):
            output = user
        use = OpUse(node.name, op_info.op_names(node), module_frames(node))
        return Match(node, info, output, norm if isinstance(norm, fx.Node) else None, use)

    def _is_fused(self, node: fx.Node) -> bool:
        """Whether the target computes an activation function with the op before."""
        info = op_info.info_of(node)
        if info is None or info.activation is None:
            return False
        return self.fused is None or info.names[0] in self.fused

    def _operand_places(
        self, match: Match
    ) -> list[tuple[tuple[fx.Node, int], tuple[str | int, ...]]]:
        """((operand, position), slot names) of the data operands."""
        node = match.node
        places: list[tuple[tuple[fx.Node, int], tuple[str | int, ...]]] = []
        schema = getattr(node.target, "_schema", None)
        flat = operands(node)
        for slot in match.info.data:
            if slot >= len(node.args):
                continue
            argument = node.args[slot]
            items = argument if isinstance(argument, list | tuple) else [argument]
            name = schema.arguments[slot].name if schema is not None else str(slot)
            first = len(nodes_in(node.args[:slot]))
            offset = 0
            for index, item in enumerate(items):
                if not isinstance(item, fx.Node):
                    continue
                position = first + offset
                offset += 1
                assert flat[position] is item
                if item in self.data and is_float(item):
                    place = index if len(items) > 1 else match.info.data.index(slot)
                    places.append(((item, position), (place, str(place), name)))
        return places

    def _why_float(self, match: Match, places: list[Any]) -> str:
        name, node = match.info.names[0], match.node
        if match.info.scales is Scales.FLOAT:
            return f"{name} is left in float unless a config names it"
        if node not in self.data:
            return "depends on no float input and no parameter"
        if match.info.both_data and len(places) < 2:
            return "one operand is a constant, a scalar or a mask"
        if match.info.pools_over is not None and not is_pooling(node):
            return "an average over the last axis"
        if match.info.arithmetic and inside_norm(match.use.frames):
            return f"part of {match.use.frames[-1].type.rpartition('.')[2]}"
        if node in self.scores and match.info.attention != "product":
            return "attention scores, which a softmax reads"
        if self.in_float.is_product(node, match.info):
            lacks = self.in_float.lacks_kernel(node, match.info)
            return lacking(match.info) if lacks else ""
        if node in self.in_float.lone:
            return self.in_float.lone[node]
        return self._only_float(match) if match.info.data else ""

    def _in_integers(self, match: Match) -> bool:
        """Whether the target has to round a result that it could leave in float."""
        weights = (op_info.argument(match.node, slot.position) for slot in match.info.weights)
        stored = any(isinstance(w, fx.Node) and w not in self.data for w in weights)
        loose = match.output in self.normed or match.output in self.in_float.tail
        convolved = match.info.convolution is not None and not loose
        return stored and (self.integer_results or convolved)

    def _only_float(self, match: Match) -> str:
        return self.in_float.ends.get(match.output, "")

    def _pass_on(self, node: fx.Node, names: tuple[str, ...]) -> None:
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return
        known = self.values.get(source)
        if known is None or known.output is None or node in self.values:
            return
        info = op_info.info_of(node)
        if info is not None and op_info.argument(node, info.fill):
            return  # what it fills with may lie between the steps of the scale
        value = node.meta.get("val")
        use = OpUse(node.name, names, module_frames(node))
        selection = self.selector.select_slot(use, "output", (0, "output"))
        if selection.spec is None and selection.path.endswith(" is None") and selection.named_op:
            return
        if isinstance(value, Tensor) and not is_float(node):
            return
        self.values[node] = PlannedValue(known.output, derived=True)
        self.sharing.append([source, node])

    def _request_output(self, node: fx.Node, selection: Selection) -> None:
        self.values.setdefault(node, PlannedValue()).output = self._request(node, selection)

    def _request_input(
        self, operand: fx.Node, node: fx.Node, position: int, selection: Selection
    ) -> None:
        value = self.values.setdefault(operand, PlannedValue())
        value.inputs[node, position] = self._request(node, selection)

    def _request(self, node: fx.Node, selection: Selection) -> Request:
        # a quantization config holds no other specs
        spec = cast("QuantizationSpec", selection.spec)
        granularity = spec.granularity
        if not isinstance(granularity, PerTensorGranularity | PerChannelGranularity) or (
            isinstance(granularity, PerChannelGranularity) and granularity.axis is None
        ):
            if spec.dynamic and isinstance(granularity, PerBlockGranularity):
                return Request(spec, selection.rank, selection.path, self.order[node])
            raise ConfigError(
                f"{selection.path}: activations have one scale per tensor, per channel of a given"
                f" axis, or, with qparam_calculator_cls 'dynamic', per block; got {granularity}"
            )
        if grid_of(spec).is_float and not isinstance(granularity, PerTensorGranularity):
            raise ConfigError(f"{selection.path}: float activations have one scale per tensor")
        return Request(spec, selection.rank, selection.path, self.order[node])

    def _note_float(self, match: Match, reason: str) -> None:
        if match.info.scales is Scales.COMPUTE or match.info.scales is Scales.SHARE:
            self.floats.append((match.node.name, match.use.op_types[0], reason))

    # --- module boundaries ----------------------------------------------------------------------
    def _module_slots(self) -> None:
        frames: dict[str, ModuleFrame] = {"": ModuleFrame("", "")}
        inside: dict[str, list[fx.Node]] = {"": []}
        for node in self.gm.graph.nodes:
            if node.op != "call_function":
                continue
            inside[""].append(node)
            for frame in module_frames(node):
                frames.setdefault(frame.name, frame)
                if frame.name:
                    inside.setdefault(frame.name, []).append(node)
        for name, frame in frames.items():
            self._boundary(frame, inside.get(name, []))

    def _boundary(self, frame: ModuleFrame, inside: list[fx.Node]) -> None:
        path, slots = self.selector.module_slots(frame, "input")
        if slots:
            entering = entering_values(inside, self.data)
            for index, (operand, places) in enumerate(entering.items()):
                selection = self._boundary_spec(path, slots, index)
                value = self.values.setdefault(operand, PlannedValue())
                for node, position in places:
                    if selection is None:
                        value.inputs.pop((node, position), None)
                    elif selection.spec is not None:
                        value.inputs[node, position] = self._request(node, selection)
        path, slots = self.selector.module_slots(frame, "output")
        if slots:
            leaving = leaving_values(inside, self.data)
            for index, node in enumerate(leaving):
                selection = self._boundary_spec(path, slots, index)
                value = self.values.setdefault(node, PlannedValue())
                if selection is None:
                    value.output = None
                elif selection.spec is not None:
                    value.output, value.derived = self._request(node, selection), False

    def _boundary_spec(
        self, path: str, slots: dict[str | int, Any], index: int
    ) -> Selection | None:
        """What a boundary slot asks for; None where it is switched off."""
        for slot in (index, str(index), "*"):
            if slot in slots:
                self.selector.matched_slot(path, slot)
                spec = slots[slot]
                where = f"{path}[{slot!r}]"
                return None if spec is None else Selection(spec, where, True, (3, 0), True)
        return Selection(None, path)

    # --- groups ---------------------------------------------------------------------------------
    def _resolve(self) -> ActivationPlan:
        wanted = {
            node: value
            for node, value in self.values.items()
            if value.output is not None or value.inputs
        }
        outputs: dict[fx.Node, ActivationPoint] = {}
        inputs: dict[tuple[fx.Node, int], ActivationPoint] = {}
        remarks: list[str] = []
        groups = [
            sorted(group & wanted.keys(), key=self.order.__getitem__)
            for group in connected(wanted, self.sharing)
        ]
        for group in sorted((g for g in groups if g), key=lambda g: self.order[g[0]]):
            requests = [request for node in group for request in wanted[node].requests()]
            if not requests:
                continue  # views of a value that a module boundary has switched off
            chosen = max(requests, key=lambda request: (request.rank, -request.order))
            remarks += overruled(group[0].name, chosen, requests)
            spec = with_known_range(chosen.spec, [n for n in group if not wanted[n].derived])
            point = ActivationPoint(group[0].name, spec, chosen.path)
            for node in group:
                value = wanted[node]
                if value.output is not None:
                    balanced = len(group) == 1 and node in self.normed
                    outputs[node] = replace(point, derived=value.derived, balanced=balanced)
                else:
                    inputs.update(dict.fromkeys(value.inputs, point))
        rounded = outputs.keys() | {operands(node)[place] for node, place in inputs}
        # a module's own slots come last, and may round what leaves the program
        given = {(m.node.name, f"result: {LEAVES}") for m in self.matches if m.output in outputs}
        noted = [row for row in self.floats if (row[0], row[2]) not in given]
        floats = tuple(dict.fromkeys((*noted, *self._left_over(outputs.keys(), rounded))))
        return ActivationPlan(outputs, inputs, tuple(self.matches), floats, tuple(remarks))

    def _left_over(
        self, whole: Set[fx.Node], rounded: Set[fx.Node]
    ) -> Iterator[tuple[str, str, str]]:
        """Why values stay in float that no computing op has spoken of."""
        known = {name for name, _, _ in self.floats}
        for node in self.gm.graph.nodes:
            if node.op != "call_function" or node not in self.data or not is_float(node):
                continue
            if node in whole or node.name in known:
                continue
            info = op_info.info_of(node)
            names = op_info.op_names(node)
            if info is not None and info.scales is Scales.FLOAT:
                yield node.name, names[0], self._why_float_op(node, node in rounded)
            elif node not in rounded:
                yield node.name, names[0], "no op that computes with integers reads it"

    def _why_float_op(self, node: fx.Node, rounded: bool) -> str:
        if rounded:
            return "computed in float, and rounded for the readers that are listed with its scale"
        if self.in_float.ends.get(node, LEAVES) != LEAVES:
            return self.in_float.ends[node]
        return "left in float unless a config names it"
