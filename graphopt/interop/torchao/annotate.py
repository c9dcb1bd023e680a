"""AnnotateFromTorchao: a torchao Quantizer annotates one of our graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, fx
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from typing_extensions import override

from graphopt.analysis.weights import WeightTensor, find_weights
from graphopt.compressors.flow import joint_pipeline
from graphopt.compressors.options import CompressOptions
from graphopt.compressors.pipeline import Pipeline
from graphopt.config.joint import JointConfig
from graphopt.config.quantization import QuantizerConfig
from graphopt.errors import ConfigError, InputError
from graphopt.extras import deferred
from graphopt.interop.torchao.specs import activation_spec, weight_spec
from graphopt.ir.annotations import (
    ActivationPoint,
    WeightAnnotation,
    annotate_input,
    annotate_output,
    annotate_weight,
)
from graphopt.ir.editor import Editor, operands
from graphopt.ir.records import ActivationRecord
from graphopt.passes import (
    AnnotateQuantization,
)
from graphopt.passes.calibrate_activations import CalibrateActivations
from graphopt.passes.pass_base import Pass

if TYPE_CHECKING:
    import networkx as nx
else:
    nx = deferred("networkx")

__all__ = ["AnnotateFromTorchao", "quantize_with"]

_KEY = "quantization_annotation"
_SAME = (
    "dtype",
    "is_dynamic",
    "quant_min",
    "quant_max",
    "qscheme",
    "ch_axis",
    "scale",
    "zero_point",
)
Place = fx.Node | tuple[fx.Node, fx.Node]  # an output, or an edge (value, reader)


@dataclass(frozen=True)
class AnnotateFromTorchao(Pass):
    """Let a torchao quantizer say what is quantized; its annotations become ours.

    Activations keep the quantizer's observers, sharing and element types; weights are quantized from
    their own ranges. Batch norms must have been folded, as `prepare_pt2e` does. Biases whose scales
    would be derived stay in float.

    Attributes:
        quantizer: Any torchao `Quantizer`.
        transform: Whether its `transform_for_annotation` runs first. Off by default: that of
            XNNPACKQuantizer turns integer scalars into float32 tensors, which breaks models that
            compute positions.

    Examples:
        >>> from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
        >>> config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
        >>> theirs = xnnpack.XNNPACKQuantizer().set_global(config)
        >>> AnnotateFromTorchao(theirs)(program.graph_module).modified
        True
    """

    name: ClassVar[str] = "annotate-from-torchao"
    provides: ClassVar[tuple[type[Pass], ...]] = (AnnotateQuantization,)
    quantizer: Quantizer = field(compare=False)
    transform: bool = False

    @override
    def run(self, edit: Editor) -> None:
        if not isinstance(self.quantizer, Quantizer):
            raise InputError(
                f"quantizer must be a torchao Quantizer, got {type(self.quantizer).__name__}"
            )
        gm = edit.gm
        if self.transform:
            self.quantizer.transform_for_annotation(gm)
            edit.changed = True
        try:
            self.quantizer.annotate(gm)
            self.quantizer.validate(gm)
            self._take(edit)
        finally:
            for node in gm.graph.nodes:
                node.meta.pop(_KEY, None)

    def _take(self, edit: Editor) -> None:
        specs = dict(_places(edit.gm))
        groups = _groups(specs)
        weights = {node: weight for weight in find_weights(edit.gm) for node in weight.nodes}
        rows = []
        for place, spec in specs.items():
            source = place if isinstance(place, fx.Node) else place[0]
            where = f"{type(self.quantizer).__name__} at {_where(place)}"
            if isinstance(spec, DerivedQuantizationSpec):
                continue
            if source.op == "get_attr":
                if source in weights:
                    _weight(weights[source], _own(spec, specs), where)
                    edit.changed = True
                continue
            value = source.meta.get("val")
            if not isinstance(value, Tensor) or not value.is_floating_point():
                rows.append(
                    ActivationRecord(
                        name=source.name, status="float", detail=f"{where}: no float tensor"
                    )
                )
                continue
            group = groups[place]
            point = ActivationPoint(group.name, group.spec(specs, where), where)
            if isinstance(place, fx.Node):
                annotate_output(place, point)
            elif place[0] not in specs or groups[place[0]] is not group:
                for position, operand in enumerate(operands(place[1])):
                    if operand is place[0]:
                        annotate_input(place[1], position, point)
            edit.changed = True
        edit.record(activations=rows)


def quantize_with(
    quantizer: Quantizer,
    data: Iterable[Any] | None = None,
    *,
    transform: bool = False,
    on_unobserved: Literal["error", "skip"] = "error",
    progress: bool | None = None,
) -> Pipeline:
    """The pipeline that quantizes as a torchao quantizer annotates.

    >>> from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
    >>> config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    >>> theirs = xnnpack.XNNPACKQuantizer().set_global(config)
    >>> program = quantize_with(theirs, batches).run(model, example)

    Args:
        quantizer: Any torchao `Quantizer`.
        data: Calibration inputs of one call each.
        transform: Run the quantizer's `transform_for_annotation` first, see `AnnotateFromTorchao`.
        on_unobserved: "skip" leaves activations without a usable range in float.
        progress: Show a bar; None shows it on a terminal.
    """
    everything = JointConfig(quantization=QuantizerConfig())
    how = CompressOptions(fold_batch_norm=True)
    ours = joint_pipeline("quantize-with-torchao", everything, options=how)
    given = None if data is None else list(data)
    observe = CalibrateActivations(given, on_unobserved, progress, rounded_weights=False)
    theirs = ours.replace(AnnotateQuantization.name, AnnotateFromTorchao(quantizer, transform))
    return theirs.replace(observe.name, observe)


def _places(gm: fx.GraphModule) -> Iterator[tuple[Place, Any]]:
    """What is annotated, in torchao's order: inputs of a node before its output."""
    for node in gm.graph.nodes:
        annotation = node.meta.get(_KEY)
        if annotation is None:
            continue
        for operand, spec in annotation.input_qspec_map.items():
            if spec is not None:
                yield (operand, node), spec
        if annotation.output_qspec is not None:
            yield node, annotation.output_qspec


def _own(spec: Any, specs: dict[Place, Any]) -> Any:
    """The spec behind however many references to other places."""
    seen = 0
    while isinstance(spec, SharedQuantizationSpec):
        seen += 1
        if spec.edge_or_node not in specs or seen > len(specs):
            raise ConfigError(f"a shared spec refers to {spec.edge_or_node}, which has none")
        spec = specs[spec.edge_or_node]
    return spec


@dataclass(eq=False)
class _Group:
    """Places with one scale."""

    name: str
    places: list[Place]
    _spec: Any = None

    def spec(self, specs: dict[Place, Any], where: str) -> Any:
        """Our spec of the group: that of the first place that has one of its own."""
        if self._spec is None:
            self._spec = activation_spec(_own(specs[self.places[0]], specs), where)
        return self._spec


def _groups(specs: dict[Place, Any]) -> dict[Place, _Group]:
    """Sharing as torchao defines it: explicit references, and equal specs of one tensor."""
    sharing: nx.Graph[Place] = nx.Graph()
    sharing.add_nodes_from(specs)
    for place, spec in specs.items():
        if isinstance(spec, DerivedQuantizationSpec):
            continue
        if isinstance(spec, SharedQuantizationSpec):
            _own(spec, specs)
            sharing.add_edge(place, spec.edge_or_node)
        if isinstance(place, tuple) and place[1].meta[_KEY].allow_implicit_sharing:
            value = place[0]
            for other in (value, *((value, user) for user in value.users)):
                if other in specs and other != place and _alike(spec, specs[other], specs):
                    sharing.add_edge(place, other)
    order = {place: number for number, place in enumerate(specs)}
    group_of: dict[Place, _Group] = {}
    for component in nx.connected_components(sharing):
        places = sorted(component, key=order.__getitem__)
        first = places[0] if isinstance(places[0], fx.Node) else places[0][0]
        group = _Group(f"{first.name}_{order[places[0]]}", places)
        group_of |= dict.fromkeys(places, group)
    return group_of


def _alike(first: Any, second: Any, specs: dict[Place, Any]) -> bool:
    if isinstance(first, DerivedQuantizationSpec) or isinstance(second, DerivedQuantizationSpec):
        return False
    a, b = _own(first, specs), _own(second, specs)
    return all(getattr(a, name, None) == getattr(b, name, None) for name in _SAME)


def _weight(weight: WeightTensor, spec: Any, where: str) -> None:
    if weight.tensor.ndim < 2:
        return
    annotation = WeightAnnotation(weight_spec(spec, where), weight.output_axis, where)
    for node in weight.nodes:
        annotate_weight(node, annotation)


def _where(place: Place) -> str:
    return place.name if isinstance(place, fx.Node) else f"{place[0].name} → {place[1].name}"
