"""GraphOptQuantizer: our annotator as a torchao Quantizer, with observers that emit our forms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torchao.quantization.pt2e import ObserverBase
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer import QuantizationSpec as TorchaoSpec
from typing_extensions import override

from graphopt.analysis.weights import find_weights
from graphopt.compressors.joint import joint_config
from graphopt.config.joint import JointConfig
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.quantization import QuantizerConfig
from graphopt.errors import CalibrationError, ConfigError, StateError
from graphopt.fitting.calibration import without_data
from graphopt.ir.annotations import (
    ActivationPoint,
    clear_annotations,
    forget_record,
    input_points,
    output_point,
    palette_annotation,
    quantization_annotation,
)
from graphopt.ir.editor import Editor, operands
from graphopt.passes import AnnotatePalettization, AnnotateQuantization
from graphopt.passes.convert_quantization import emit_quantize_dequantize
from graphopt.prepared import ActivationQuantizer
from graphopt.schemes.base import Statistics
from graphopt.schemes.registry import scheme_of
from graphopt.specs import PalettizationSpec, QuantizationSpec
from graphopt.specs.dtypes import dtype_name

__all__ = ["GraphOptQuantizer"]

_KEY = "quantization_annotation"


class _ActivationObserver(ObserverBase):  # type: ignore[misc]
    """Observes like our quantizers and turns into the ops that ours turn into."""

    def __init__(self, spec: QuantizationSpec, name: str) -> None:
        super().__init__(dtype=torch.int8)
        self.quantizer = ActivationQuantizer(spec)
        self.quantizer.observing = True
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x)

    def calculate_qparams(self, **options: Any) -> tuple[Tensor, Tensor]:
        del options
        self.quantizer.settle()
        if not bool(self.quantizer.known):
            problem = self.quantizer.problem(*self.quantizer.observed_range())
            raise CalibrationError(f"{self.name} {problem}; run data through the prepared module")
        scale, offset = self.quantizer.parameters_of()
        return scale, torch.zeros_like(scale) if offset is None else offset

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """Replace the observer's call by quantize and dequantize ops."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        scale, offset = self.calculate_qparams()
        rounded = emit_quantize_dequantize(
            Editor(model),
            source,
            self.name,
            self.quantizer.spec,
            (scale, offset if bool(offset.any()) else None),
            before=node,
        )
        node.replace_all_uses_with(rounded)
        model.graph.erase_node(node)


class _WeightObserver(ObserverBase):  # type: ignore[misc]
    """Keeps a weight and turns into its stored form."""

    def __init__(
        self, spec: PalettizationSpec | QuantizationSpec, axis: int, name: str, seed: int
    ) -> None:
        super().__init__(dtype=torch.uint8)
        self.spec, self.axis, self.name, self.seed = spec, axis, name, seed
        self.weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.weight = x.detach()
        return x

    def calculate_qparams(self, **options: Any) -> tuple[Tensor, Tensor]:
        raise StateError("a weight has no scale before convert_pt2e turns it into its stored form")

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """Replace the observer's call by a lookup or dequantize op of constants."""
        edit, source = Editor(model), node.args[0]
        assert isinstance(source, fx.Node)
        # without data the observer has seen nothing; a weight needs none
        weight = edit.value(source) if source.op == "get_attr" else self.weight
        if weight is None:
            raise CalibrationError(f"{self.name} was never computed; run the prepared module once")
        known = Statistics(self.axis, seed=self.seed)
        stored = scheme_of(self.spec).make(weight.detach(), self.spec, known)
        dense = stored.emit(edit, self.name, source, before=node)
        node.replace_all_uses_with(dense)
        model.graph.erase_node(node)


class _Maker:
    """What torchao calls to make an observer; its own options are dropped, ours are bound."""

    def __init__(self, kind: type[ObserverBase], **options: Any) -> None:
        self._kind, self._options = kind, options
        self.__name__ = kind.__name__

    def with_args(self, **options: Any) -> Any:
        del options
        return lambda: self._kind(**self._options)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Maker:
        return self


class GraphOptQuantizer(Quantizer):  # type: ignore[misc]
    """Annotate for `prepare_pt2e` what our configs select.

    >>> from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    >>> quantizer = GraphOptQuantizer(graphopt.palettization.KMeansPalettizerConfig())
    >>> prepared = prepare_pt2e(torch.export.export(model, example).module(), quantizer)
    >>> _ = prepared(*example)
    >>> converted = convert_pt2e(prepared, fold_quantize=False)

    Palettized weights become `graphopt.lut_to_dense` of packed indices, quantized ones the forms that
    our own conversion gives them; activations keep our observers and sharing. Nodes that carry
    annotations already are left to whoever made them, so that `ComposableQuantizer` takes ours and
    others side by side; where ours is to decide the weights and another the activations of the same
    ops, which `ComposableQuantizer` refuses, give that one as `base`.

    Convert with `fold_quantize=False`: folding would compute every weight densely.

    Args:
        config: A `JointConfig`, one of its parts, or a mapping or YAML file of either.
        base: Quantizer that annotates first; weights that ours selects are taken from it.
        fused: Activation functions that the target computes together with the op before; None for all.
        on_unmatched: Whether a config key that matches nothing is an error or a warning.
        seed: Seed of vector tables.
    """

    def __init__(
        self,
        config: JointConfig
        | KMeansPalettizerConfig
        | QuantizerConfig
        | Mapping[str, Any]
        | str
        | Path,
        *,
        base: Quantizer | None = None,
        fused: frozenset[str] | None = None,
        on_unmatched: Literal["error", "warn"] = "error",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = joint_config(config)
        self.base = base
        self._fused = fused
        self._on_unmatched: Literal["error", "warn"] = on_unmatched
        self._seed = seed

    @override
    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        return model if self.base is None else self.base.transform_for_annotation(model)

    @override
    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Attach torchao annotations.

        Raises:
            ConfigError: A config key matches nothing.
            CalibrationError: A weight's algorithm needs data, which torchao's flow does not collect.
        """
        taken = {node for node in model.graph.nodes if _KEY in node.meta}
        if self.base is not None:
            self.base.annotate(model)
        edit = Editor(model)
        palettization, quantization = self.config.palettization, self.config.quantization
        if quantization is not None:
            AnnotateQuantization(quantization, self._on_unmatched, self._fused).run(edit)
            self._activations(model, taken)
        if palettization is not None:
            # a weight that both select becomes a table
            AnnotatePalettization(palettization, self._on_unmatched).run(edit)
            self._refuse_fitted(model)
        self._weights(model, taken)
        for node in model.graph.nodes:
            clear_annotations(node)
        forget_record(model)
        return model

    def _refuse_fitted(self, model: fx.GraphModule) -> None:
        """Torchao's flow shows a weight to its observer, and nothing that tables could be fitted to."""
        waiting = without_data(model)
        if waiting:
            raise CalibrationError(
                "prepare_pt2e collects no data for algorithms that need them:\n"
                + "\n".join(waiting)
                + "\nset algorithm 'kmeans' or 'auto', or use graphopt.compress"
            )

    @override
    def validate(self, model: fx.GraphModule) -> None:
        if self.base is not None:
            self.base.validate(model)

    @override
    def prepare_obs_or_fq_callback(
        self, model: fx.GraphModule, edge_or_node_to_obs_or_fq: Any
    ) -> None:
        if self.base is not None:
            self.base.prepare_obs_or_fq_callback(model, edge_or_node_to_obs_or_fq)

    def _weights(self, model: fx.GraphModule, taken: set[fx.Node]) -> None:
        for weight in find_weights(model):
            first = weight.nodes[0]
            annotation = palette_annotation(first) or quantization_annotation(first)
            if annotation is None:
                continue
            maker = _Maker(
                _WeightObserver,
                spec=annotation.spec,
                axis=annotation.output_axis,
                name=weight.name,
                seed=self._seed,
            )
            spec = TorchaoSpec(torch.uint8, maker, is_dynamic=False)
            root: Any = None
            for node in weight.nodes:
                for reader in list(node.users):
                    if reader in taken:
                        continue
                    _annotation(reader).input_qspec_map[node] = (
                        spec if root is None else SharedQuantizationSpec(root)
                    )
                    root = root or (node, reader)

    def _activations(self, model: fx.GraphModule, taken: set[fx.Node]) -> None:
        roots: dict[str, Any] = {}

        def spec_of(point: ActivationPoint, place: Any) -> Any:
            if point.group in roots:
                return SharedQuantizationSpec(roots[point.group])
            if point.spec.dynamic:
                raise ConfigError(
                    f"{point.path}: torchao's observers hold scales of calls that are past; convert with"
                    " graphopt.compress or Quantizer where they are 'dynamic'"
                )
            roots[point.group] = place
            maker = _Maker(_ActivationObserver, spec=point.spec, name=point.group)
            name = dtype_name(point.spec.dtype)
            kind = torch.uint8 if name.startswith("uint") else torch.int8
            return TorchaoSpec(kind, maker, is_dynamic=False)

        for node in model.graph.nodes:
            if node in taken:
                continue
            inputs = input_points(node)
            for position, operand in enumerate(operands(node)):
                # an op that reads a value twice has one entry for both
                if position in inputs and operand not in operands(node)[:position]:
                    spec = spec_of(inputs[position], (operand, node))
                    _annotation(node).input_qspec_map[operand] = spec
            point = output_point(node)
            if point is not None:
                _annotation(node).output_qspec = spec_of(point, node)


def _annotation(node: fx.Node) -> QuantizationAnnotation:
    annotation = node.meta.get(_KEY)
    if annotation is None:
        annotation = node.meta[_KEY] = QuantizationAnnotation(_annotated=True)
    return annotation
