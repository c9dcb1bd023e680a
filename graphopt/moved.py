"""Names of modules that have moved: they stay importable for one release, with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from graphopt.audited import own_module

__all__ = [
    "COREAI_OPT",
    "MOVED",
    "MOVED_NAMES",
    "RENAMED",
    "MovedModule",
    "moved_name",
    "provide",
    "register",
]

# old module → where its names are now, both below `graphopt`
MOVED: dict[str, str] = {
    "annotations": "ir.annotations",
    "backends.stored": "report.stored",
    "block_forward": "run.block_forward",
    "captured_module": "ir.captured_module",
    "coreml_utils.passes": "interop.coreml_utils.passes",
    "editor": "ir.editor",
    "export_errors": "capture.export_errors",
    "fake_quantize": "prepared",
    "fake_quantize.activation": "prepared.activation",
    "fake_quantize.conv_norm": "prepared.conv_norm",
    "fake_quantize.norm": "prepared.norm",
    "fake_quantize.origin": "prepared.origin",
    "fake_quantize.palette": "prepared.palette",
    "fake_quantize.pruner": "prepared.pruner",
    "fake_quantize.rounding": "prepared.straight_through",
    "fake_quantize.weight": "prepared.weight",
    "graph_text": "ir.graph_text",
    "inference_form": "capture.inference_form",
    "inspection.bits": "report.bits",
    "inspection.difference": "report.difference",
    "inspection.drawing": "report.drawing",
    "inspection.inspector": "report.inspector",
    "inspection.model": "report.model",
    "inspection.output_errors": "report.output_errors",
    "inspection.page": "report.page",
    "inspection.summary": "report.summary",
    "inspection.text": "report.text",
    "joint": "compressors.joint",
    "layer_fit": "fitting.moments",
    "layerwise": "run.layerwise",
    "lookups": "analysis.stored_values",
    "matrix_form": "analysis.matrix_form",
    "mixed_precision.analysis": "search.mixed_precision.analysis",
    "mixed_precision.candidates": "search.mixed_precision.candidates",
    "mixed_precision.choose": "search.mixed_precision.choose",
    "mixed_precision.combined": "search.mixed_precision.recipe_evaluation",
    "mixed_precision.configs": "search.mixed_precision.configs",
    "mixed_precision.exact": "search.mixed_precision.exact",
    "mixed_precision.fast": "search.mixed_precision.fast",
    "mixed_precision.floor": "search.mixed_precision.accuracy_drop",
    "mixed_precision.layers": "search.mixed_precision.layers",
    "mixed_precision.measurements": "search.mixed_precision.measurements",
    "mixed_precision.metrics": "search.mixed_precision.metrics",
    "mixed_precision.plots": "search.mixed_precision.plots",
    "mixed_precision.recipe": "search.mixed_precision.recipe",
    "mixed_precision.records": "search.mixed_precision.records",
    "mixed_precision.refine": "search.mixed_precision.exchange_search",
    "mixed_precision.refining": "search.mixed_precision.refinement",
    "mixed_precision.sensitivity_table": "search.mixed_precision.sensitivity_table",
    "mixed_precision.sizes": "search.mixed_precision.sizes",
    "mixed_precision.solvers": "search.mixed_precision.solvers",
    "mixed_precision.stacked": "search.mixed_precision.batched_candidates",
    "mixed_precision.suffix": "run.partial_rerun",
    "mixed_precision.survey": "search.mixed_precision.layer_statistics",
    "mixed_precision.sweep": "search.mixed_precision.sweep",
    "palettization.calibration": "fitting.calibration",
    "palettization.dkm": "compressors.dkm",
    "palettization.fit_palettes": "passes.fit_palettes",
    "palettization.output_fit": "fitting.output_fit",
    "palettization.training": "compressors.training",
    "partition": "analysis.partition",
    "pass_base": "passes.pass_base",
    "pass_manager": "passes.pass_manager",
    "passes.op_patterns": "ir.op_info",
    "passes.quantization_plan": "analysis.quantization_plan",
    "passes.raise_quantization": "backends.coreai.raise_quantization",
    "passes.raise_to_vocabulary": "backends.raising",
    "passes.select_weights": "analysis.select_weights",
    "passes.value_facts": "analysis.value_facts",
    "program": "ir.program",
    "pruning.pruner": "compressors.pruner",
    "quantization.calibrate_activations": "passes.calibrate_activations",
    "quantization.conversion": "prepared.conversion",
    "quantized": "analysis.quantized",
    "quantized_state": "prepared.state",
    "rdo.activations": "search.rdo.activations",
    "rdo.allocation": "search.rdo.allocation",
    "rdo.as_pass": "search.rdo.as_pass",
    "rdo.assembly": "search.rdo.flow",
    "rdo.comparison": "search.rdo.comparison",
    "rdo.config": "search.rdo.config",
    "rdo.curvature": "search.rdo.curvature",
    "rdo.fits": "search.rdo.layer_fit",
    "rdo.picture": "search.rdo.picture",
    "rdo.pipeline": "search.rdo.pipeline",
    "rdo.rate": "fitting.scales_by_rate",
    "rdo.report": "search.rdo.report",
    "rdo.rounding": "search.rdo.adaptive_rounding",
    "rdo.search": "search.rdo.search",
    "rdo.session": "search.rdo.session",
    "rdo.sites": "search.rdo.graph_layers",
    "rdo.soft": "schemes.relaxed",
    "rdo.state": "search.rdo.state",
    "rdo.walk": "search.rdo.blockwise_run",
    "schemes.palettize_outputs": "fitting.palettize_outputs",
    "schemes.quantize_outputs": "fitting.quantize_outputs",
    "sensitivity": "fitting.sensitivity",
    "sensitivity.collector": "fitting.sensitivity.collector",
    "sensitivity.losses": "fitting.sensitivity.losses",
    "sensitivity.storage": "fitting.sensitivity.storage",
    "table": "ir.records",
    "torchao.annotate": "interop.torchao.annotate",
    "torchao.quantizer": "interop.torchao.quantizer",
    "torchao.specs": "interop.torchao.specs",
    "specs.targets": "backends.registry",
    "tuning": "passes.tune",
    "weights": "analysis.weights",
}

# coreai-opt's modules that are thinner here → the module with their names; these stay
COREAI_OPT: dict[str, str] = {
    "coreai_utils.passes": "interop.coreai_utils.passes",
    "quantization.quantizer": "compressors.quantizer",
    "palettization.kmeans": "compressors.kmeans",
    "coreai_utils.common": "interop.coreai_utils.common",
    "casting.casting": "casting",
    "coreai_utils.passes.weight_palettization": "coreai_utils",
    "coreai_utils.passes.weight_quantization": "coreai_utils",
    "coreai_utils.passes.weight_sparsification": "coreai_utils",
    "config.compression_config": "config",
    "config.spec": "config",
    "config.spec.base": "config",
    "config.spec.compression_simulator": "config",
    "config.spec.factory": "config",
    "inspection.bits_per_weight": "inspection",
    "inspection.model_inspector": "inspection",
    "inspection.types": "inspection",
    "palettization.config.palettization_config": "palettization.config",
    "palettization.kmeans.palettizer": "palettization",
    "palettization.spec.granularity": "palettization.spec",
    "palettization.spec.spec": "palettization.spec",
    "palettization.spec.training_strategy": "palettization.spec",
    "pruning.config.magnitude_pruner_config": "pruning.config",
    "pruning.config.sparsity_schedule": "pruning.config",
    "pruning.magnitude_pruner": "pruning",
    "pruning.spec.prune": "pruning.spec",
    "pruning.spec.scheme": "pruning.spec",
    "pruning.spec.spec": "pruning.spec",
    "quantization.config.quantization_config": "quantization.config",
    "quantization.spec.factory": "quantization.spec",
    "quantization.spec.granularity": "quantization.spec",
    "quantization.spec.fake_quantize": "quantization.spec",
    "quantization.spec.qformulation": "quantization.spec",
    "quantization.spec.qparams_calculator": "quantization.spec",
    "quantization.spec.qscheme": "quantization.spec",
    "quantization.spec.range_calculator": "quantization.spec",
    "quantization.spec.spec": "quantization.spec",
}

# names that did not go where the rest of their module went
MOVED_NAMES: dict[str, str] = {
    "quantized.QuantizedTensor": "analysis.stored_values",
    "quantized.find_quantized_weights": "analysis.stored_values",
    "rdo.fits.LayerSite": "search.rdo.graph_layers",
    "rdo.rate.entropy": "schemes.sizes",
    "api.as_program": "backends.lowering",
    "api.compressed": "compressors.compressed_program",
    "api.convert_for": "backends.lowering",
    "api.lower_by_suffix": "backends.lowering",
    "backends.base.Capabilities": "backends.capabilities",
    "backends.base.Verification": "backends.verification",
    "backends.base.check_precision": "backends.options",
    "backends.base.compare_outputs": "backends.verification",
    "backends.base.match_inputs": "backends.interface",
    "backends.base.named_inputs": "backends.interface",
    "backends.base.quantization_refusals": "backends.capabilities",
    "specs.ExportBackend": "backends.registry",
    "annotations.Findings": "prepared.findings",
    "weights.op_names": "ir.op_info",
    "weights.module_frames": "ir.module_frames",
    "annotations.findings_of": "prepared.findings",
    "annotations.keep_findings": "prepared.findings",
    "layerwise.Batch": "run.batches",
    "layerwise.as_batch": "run.batches",
    "layerwise.flat_inputs": "run.batches",
    "program.CompressedProgram": "compressors.compressed_program",
    "table.CompressionTable": "report.table",
}

# in a new module: old name → what it is called now
RENAMED: dict[str, dict[str, str]] = {
    # of `passes.op_patterns`; its tables of patterns are rows of `OpInfo` now and have no old form
    "ir.op_info": {"Kind": "Scales"},
    "run.partial_rerun": {"GraphPlan": "RerunPlan", "SuffixRun": "PartialRerun"},
    "search.mixed_precision.batched_candidates": {"Stacker": "CandidateBatcher"},
    "search.mixed_precision.choose": {"Options": "LayerChoices", "options_of": "choices_of"},
    "search.mixed_precision.exchange_search": {
        "Exchange": "ExchangeModel",
        "refine_choice": "search_exchanges",
    },
    "search.mixed_precision.layer_statistics": {
        "Migration": "CorrectionPoint",
        "Survey": "LayerStatistics",
        "site_of": "correction_point",
        "survey": "collect_statistics",
    },
    "search.mixed_precision.recipe_evaluation": {"Combined": "RecipeEvaluator"},
    "search.mixed_precision.refinement": {
        "combined_of": "recipe_evaluator",
        "refined": "refine_recipe",
    },
    "search.rdo.blockwise_run": {"BlockSite": "GraphBlock", "Walk": "BlockwiseRun"},
    "search.rdo.graph_layers": {
        "LayerSite": "GraphLayer",
        "sites_by_layer": "layers_by_name",
        "sites_by_node": "layers_by_node",
    },
    "search.rdo.layer_fit": {"Fitted": "LayerFit"},
    "schemes.relaxed": {
        "SoftInteger": "RelaxedInteger",
        "SoftPalette": "RelaxedPalette",
        "SoftWeight": "RelaxedWeight",
    },
}


class MovedModule(ModuleType):
    """Stands under a module's old name and hands out the names of the new one.

    Args:
        old: Dotted name that the module had.
        new: Dotted name that it has.
        elsewhere: Name → module of those that went to another one.
        leaves: Whether the old name goes with the next release, which is said with a warning.
    """

    def __init__(
        self, old: str, new: str, elsewhere: Mapping[str, str], *, leaves: bool = True
    ) -> None:
        super().__init__(old, f"Moved to `{new}`." if leaves else f"Names of `{new}`.")
        self.__path__: list[str] = []
        self._new = new
        self._leaves = leaves
        self._elsewhere = dict(elsewhere)

    def __getattr__(self, name: str) -> Any:
        if name == "__all__" and not self._leaves:
            return self.names()
        if name.startswith("__"):
            raise AttributeError(name)  # whoever looks through sys.modules imports nothing
        new = self._elsewhere.get(name, self._new)
        if not self._leaves:
            return getattr(own_module(new), name)
        warnings.warn(
            f"{self.__name__} has moved to {new}; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        renamed = RENAMED.get(new.partition(".")[2], {})
        return getattr(own_module(new), renamed.get(name, name))

    def names(self) -> list[str]:
        """Public names of the new module."""
        return list(getattr(own_module(self._new), "__all__", ()))


def moved_name(module: str, name: str) -> Any:
    """A name that a module no longer has; what `__getattr__` of a module that stays returns.

    Args:
        module: Dotted name of the module, such as "graphopt.specs".
        name: What was asked for.

    Raises:
        AttributeError: It never had it.
    """
    root, _, path = module.partition(".")
    new = MOVED_NAMES.get(f"{path}.{name}")
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(
        f"{module}.{name} has moved to {root}.{new}; the old name goes with the next release",
        DeprecationWarning,
        stacklevel=3,
    )
    return getattr(own_module(f"{root}.{new}"), name)


def register(root: str) -> None:
    """Put every old name below the package `root` where imports look for it."""
    for old, new in MOVED.items():
        elsewhere = {
            path.removeprefix(f"{old}."): f"{root}.{module}"
            for path, module in MOVED_NAMES.items()
            if path.rpartition(".")[0] == old
        }
        moved = MovedModule(f"{root}.{old}", f"{root}.{new}", elsewhere)
        sys.modules.setdefault(f"{root}.{old}", moved)


def provide(module: str) -> None:
    """Put coreai-opt's modules below one of ours where imports look for them.

    The module calls it when it is imported itself, so that those above an alias are always there.

    Args:
        module: Dotted name of a module that is in `sys.modules`.
    """
    root, _, path = module.partition(".")
    for old, new in COREAI_OPT.items():
        parent, _, child = old.rpartition(".")
        if parent == path:
            name = f"{root}.{old}"
            alias = MovedModule(name, f"{root}.{new}", {}, leaves=False)
            present = sys.modules.setdefault(name, alias)
            if not hasattr(sys.modules[module], child):  # a function may have the name, too
                setattr(sys.modules[module], child, present)
            provide(name)
