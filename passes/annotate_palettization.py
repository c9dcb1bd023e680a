"""Decide for every candidate tensor what a palettization config makes of it."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from typing_extensions import override

from graphopt.annotations import WeightAnnotation, annotate_weight
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.selection import Selector, closest
from graphopt.editor import Editor
from graphopt.errors import CompressionError, ConfigError, ConfigWarning
from graphopt.pass_base import Pass
from graphopt.schemes.palettize import plan_layout
from graphopt.specs import PalettizationSpec
from graphopt.table import CompressionTable, TensorRecord, merged
from graphopt.weights import WeightTensor, find_weights, module_frames

__all__ = ["AnnotatePalettization"]

_log = logging.getLogger(__name__)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class AnnotatePalettization(Pass):
    """Attach a `WeightAnnotation` to the constants that a config selects.

    The graph's nodes stay as they are; `gm.meta` gets the table of what will not be compressed and
    why.

    Attributes:
        config: What is asked for.
        on_unmatched: Whether a key that matches no module, op or state is an error or a warning.
            Module types are always a warning, since one config serves many models.
    """

    name: ClassVar[str] = "annotate-palettization"
    config: KMeansPalettizerConfig
    on_unmatched: Literal["error", "warn"] = "error"

    @override
    def run(self, edit: Editor) -> None:
        selector = Selector(self.config)
        for node in edit.gm.graph.nodes:
            if node.op == "call_function":
                selector.touch(module_frames(node))
        weights = find_weights(edit.gm)
        rows = []
        for weight in weights:
            for use in weight.uses:
                selector.touch(use.frames)
            decision, path, conflict = self._decide(weight, selector)
            if isinstance(decision, PalettizationSpec):
                annotation = WeightAnnotation(decision, weight.output_axis, path)
                for node in weight.nodes:
                    annotate_weight(node, annotation)
                edit.changed = True
            elif weight.tensor.ndim >= 2 or weight.compressed or decision.startswith("!"):
                rows.append(_skipped(weight, decision.removeprefix("!"), conflict))
        remarks = self._report_unmatched(selector, edit, weights)
        table = CompressionTable(tuple(rows), tuple(remarks))
        before = edit.gm.meta.get("graphopt.table", CompressionTable(()))
        edit.gm.meta["graphopt.table"] = merged(before, table)

    def _decide(
        self, weight: WeightTensor, selector: Selector
    ) -> tuple[PalettizationSpec | str, str, str]:
        """The spec, or why there is none; the config path; a remark on conflicting uses."""
        chosen: PalettizationSpec | None = None
        path, reason, conflict, off = "", "", "", ""
        for use in weight.uses:
            selection = selector.select(use)
            if not isinstance(selection.spec, PalettizationSpec):
                reason = reason or selection.path
                off = off or (selection.path if selection.switched_off else "")
            elif weight.data_like and not selection.own_name:
                reason = (
                    f"a matmul operand that the model does not train; name {use.own_name!r} in"
                    " op_state_spec or module_state_spec to palettize it"
                )
            elif chosen is None:
                chosen, path = selection.spec, selection.path
            elif chosen != selection.spec:
                conflict = f"{use.node} asks for another spec ({selection.path}); {path} holds"
        if chosen is not None and off:
            conflict = f"it is tied, and {off}, but {path} holds"
        if conflict:
            warnings.warn(f"{weight.name}: {conflict}", ConfigWarning, stacklevel=2)
        if weight.compressed:
            return "already compressed", "", ""
        if not weight.uses:
            users = ", ".join(weight.other_users) or "no op"
            return f"used by {users}, which takes no compressible state", "", ""
        if chosen is None:
            return reason, "", ""
        refusal = self._refusal(weight, chosen)
        return (f"!{refusal}", "", conflict) if refusal else (chosen, path, conflict)

    def _refusal(self, weight: WeightTensor, spec: PalettizationSpec) -> str:
        if weight.tensor.dtype not in _DTYPES:
            return f"{weight.tensor.dtype} values are not palettized"
        if weight.tensor.numel() == 0:
            return "has no elements"
        threshold = self.config.weight_threshold
        if weight.tensor.numel() <= threshold:
            return f"{weight.tensor.numel()} elements do not exceed weight_threshold={threshold}"
        try:
            layout = plan_layout(weight.tensor.shape, weight.output_axis, spec)
        except CompressionError as error:
            warnings.warn(f"{weight.name}: {error}; left as it is", ConfigWarning, stacklevel=2)
            return str(error)
        if layout.note:
            warnings.warn(f"{weight.name}: {layout.note}", ConfigWarning, stacklevel=2)
        return ""

    def _report_unmatched(
        self, selector: Selector, edit: Editor, weights: list[WeightTensor]
    ) -> list[str]:
        missing = selector.unmatched()
        if not missing:
            return []
        frames = [frame for node in edit.gm.graph.nodes for frame in module_frames(node)]
        uses = [use for weight in weights for use in weight.uses]
        names = {
            "module_name_configs": sorted({frame.name for frame in frames if frame.name}),
            "module_type_configs": sorted({frame.type for frame in frames}),
            "op_type_config": sorted({name for use in uses for name in use.op_types}),
            "op_name_config": [use.node for use in uses],
            "module_state_spec": sorted({use.tensor for use in uses}),
            "op_state_spec": sorted({name for use in uses for name in use.state_names}),
        }
        errors: list[str] = []
        remarks: list[str] = []
        for section, key in missing:
            kind = section.rpartition(".")[2]
            near = closest(key, names[kind])
            text = f"{section}[{key!r}] matches nothing in the model"
            text += f"; closest: {', '.join(near)}" if near else f"; there are: {names[kind][:8]}"
            lenient = self.on_unmatched == "warn" or kind in (
                "module_type_configs",
                "op_type_config",
            )
            (remarks if lenient else errors).append(text)
        if errors:
            raise ConfigError("\n".join(errors))
        for text in remarks:
            warnings.warn(text, ConfigWarning, stacklevel=2)
        return remarks


def _skipped(weight: WeightTensor, reason: str, note: str) -> TensorRecord:
    tensor = weight.tensor
    return TensorRecord(
        name=weight.name,
        aliases=weight.aliases,
        module_type=weight.module_type,
        ops=tuple(dict.fromkeys(use.op_types[0] for use in weight.uses)) or weight.other_users,
        nodes=tuple(use.node for use in weight.uses),
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        status="skipped",
        detail=reason,
        note=note,
        stored_bits=tensor.numel() * tensor.element_size() * 8,
    )
