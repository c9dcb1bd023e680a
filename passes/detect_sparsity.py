"""Take weights that hold many zeros for pruned ones, where a palettization spec asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from typing_extensions import override

from graphopt.analysis.select_weights import FLOAT_DTYPES, decide
from graphopt.analysis.weights import WeightTensor, find_weights
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.selection import Selector
from graphopt.ir.editor import Editor
from graphopt.passes.pass_base import Pass
from graphopt.schemes.prune import prune
from graphopt.schemes.rewrite import replace_weight
from graphopt.specs import PalettizationSpec, PruningSpec

__all__ = ["DetectSparsity"]


@dataclass(frozen=True)
class DetectSparsity(Pass):
    """Store of weights with enough exact zeros only the rest, so that tables are for that alone.

    Before:
        %w = get_attr[fc.weight]

    After:
        %values = get_attr[fc.weight_values]
        %mask = get_attr[fc.weight_mask]
        %w = graphopt.sparse_to_dense(%values, %mask, shape)

    Attributes:
        config: Whose specs have a `sparsity_detection_threshold`.

    Examples:
        >>> from graphopt.palettization import KMeansPalettizerConfig, ModuleKMeansPalettizerConfig
        >>> spec = {"n_bits": 4, "sparsity_detection_threshold": 0.5}
        >>> config = KMeansPalettizerConfig(
        ...     global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
        ... )
        >>> gm = program.graph_module
        >>> DetectSparsity(config)(gm).modified  # nothing is zero
        False
        >>> weight = gm.get_parameter("0.weight")
        >>> with torch.no_grad():
        ...     _ = weight.copy_(weight.clamp(min=0.1) - 0.1)
        >>> DetectSparsity(config)(gm).modified
        True
    """

    name: ClassVar[str] = "detect-sparsity"
    config: KMeansPalettizerConfig

    @override
    def run(self, edit: Editor) -> None:
        selector, rows = Selector(self.config), []
        for weight in find_weights(edit.gm):
            decision = decide(
                weight, selector, PalettizationSpec, partial(_refusal, weight), "store"
            )
            if decision.spec is None:
                continue
            threshold = decision.spec.sparsity_detection_threshold or 0.0
            mask = weight.tensor != 0
            share = 1 - int(mask.count_nonzero()) / mask.numel()
            if share > 0 and share >= threshold:
                spec = PruningSpec(target_sparsity=share)
                rows.append(replace_weight(edit, weight, prune(weight.tensor, mask), spec))
        edit.record(rows)


def _refusal(weight: WeightTensor, spec: PalettizationSpec) -> str:
    if spec.sparsity_detection_threshold is None:
        return "no zeros are looked for"
    if weight.sparse is not None:
        return "is pruned already"
    if weight.tensor.dtype not in FLOAT_DTYPES or weight.tensor.numel() == 0:
        return "has no float values"
    return ""
