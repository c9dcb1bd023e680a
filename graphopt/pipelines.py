"""The named pipelines, as values that can be changed, inspected and run anywhere.

>>> pipeline = pipelines.palettize(KMeansPalettizerConfig.presets.w4())
>>> pipeline = pipeline.insert_after("annotate-palettization", MyPass())
>>> program = pipeline.run(model, example_inputs, dump_dir="out/passes", verify=True)

A pipeline is a sequence of passes and itself a pass, so `torch.fx`'s own manager takes either form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from graphopt.api import as_program, compressed
from graphopt.config.joint import JointConfig
from graphopt.config.palettization import KMeansPalettizerConfig
from graphopt.config.quantization import QuantizerConfig
from graphopt.errors import InputError
from graphopt.joint import AnyConfig, joint_config, joint_passes
from graphopt.pass_base import PassResult
from graphopt.pass_manager import (
    AnyPass,
    PassManager,
    PassRecord,
    PassReport,
    check_order,
    name_of,
)
from graphopt.passes import RaiseToVocabulary, RemoveUnused
from graphopt.program import CompressedProgram, Program
from graphopt.rdo import OptimizeRateDistortion, RDOConfig
from graphopt.sensitivity import LossFn
from graphopt.specs import ExportBackend

__all__ = [
    "PassManager",
    "PassRecord",
    "PassReport",
    "Pipeline",
    "joint",
    "palettize",
    "quantize",
    "rdo",
]


@dataclass(frozen=True)
class Pipeline(Sequence[AnyPass]):
    """Passes in an order that is checked whenever one is made.

    Every change returns a new pipeline; one in which a pass comes before another that it needs is
    refused with the names of both.

    Attributes:
        name: Name for people.
        passes: Ours, any callable in torch.fx's pass form, or pipelines, whose passes take their
            place.

    Raises:
        PassError: A pass comes before one that it needs, or is no pass.
    """

    name: str
    passes: tuple[AnyPass, ...]

    def __post_init__(self) -> None:
        flat: list[AnyPass] = []
        for each in self.passes:
            flat += each.passes if isinstance(each, Pipeline) else (each,)
        object.__setattr__(self, "passes", tuple(flat))
        check_order(self.passes)

    @overload
    def __getitem__(self, index: int) -> AnyPass: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[AnyPass]: ...
    def __getitem__(self, index: int | slice) -> AnyPass | Sequence[AnyPass]:
        return self.passes[index]

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[AnyPass]:
        return iter(self.passes)

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Run on a graph module in place, as a pass."""
        return PassManager(self.passes)(gm)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the passes, in order."""
        return tuple(name_of(each) for each in self.passes)

    def insert_before(self, name: str, *passes: AnyPass) -> Pipeline:
        """Put passes in front of the first one of that name."""
        return self._changed(self._place(name), 0, passes)

    def insert_after(self, name: str, *passes: AnyPass) -> Pipeline:
        """Put passes behind the last one of that name."""
        self._place(name)
        behind = len(self) - self.names[::-1].index(name)
        return self._changed(behind, 0, passes)

    def replace(self, name: str, *passes: AnyPass) -> Pipeline:
        """Put passes in the place of the first one of that name."""
        return self._changed(self._place(name), 1, passes)

    def without(self, name: str) -> Pipeline:
        """Leave out the first pass of that name."""
        return self._changed(self._place(name), 1, ())

    def reordered(self, names: Sequence[str]) -> Pipeline:
        """The same passes in another order, given by all their names.

        Raises:
            InputError: The names are not those of the passes.
        """
        if sorted(names) != sorted(self.names):
            raise InputError(f"reordered() needs each of {list(self.names)}, got {list(names)}")
        waiting = list(self.passes)
        order = []
        for name in names:
            found = next(each for each in waiting if name_of(each) == name)
            waiting.remove(found)
            order.append(found)
        return replace(self, passes=tuple(order))

    def _place(self, name: str) -> int:
        if name not in self.names:
            raise InputError(f"no pass {name!r} in pipeline {self.name!r}: {list(self.names)}")
        return self.names.index(name)

    def _changed(self, place: int, drop: int, passes: Sequence[AnyPass]) -> Pipeline:
        kept = (*self.passes[:place], *passes, *self.passes[place + drop :])
        return replace(self, passes=kept)

    def run(
        self,
        model: nn.Module | ExportedProgram | Program | str | Path,
        example_inputs: tuple[Any, ...] | Tensor | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        dump_dir: str | Path | None = None,
        verify: bool = False,
    ) -> CompressedProgram:
        """Capture a model and run the passes on it; the model is never changed.

        Args:
            model: A module, an exported program, a `Program` or a .pt2 file.
            example_inputs: Inputs of one call.
            example_kwargs: Keyword inputs of that call.
            dump_dir: Folder for the graph before and after each pass, with a unified diff.
            verify: Compare each pass with its input on the example inputs; see `PassManager`.

        Returns:
            The program; its `pass_report` has times, node counts and errors of each pass.

        Raises:
            CaptureError: The model cannot be exported.
            PassError: A pass computes something else than it must, or left an invalid graph.
        """
        program = as_program(model, example_inputs, example_kwargs)
        manager = PassManager(
            self.passes, dump_dir, verify, program.example_args, program.example_kwargs
        )
        report = manager.run(program.graph_module)
        return replace(compressed(program), pass_report=report)


def palettize(
    config: KMeansPalettizerConfig | Mapping[str, Any] | str | Path | None = None,
    data: Sequence[Any] | None = None,
    loss_fn: LossFn | None = None,
    **options: Any,
) -> Pipeline:
    """Weights become tables.

    Args:
        config: What becomes of which weight, or a mapping or YAML file of it; 4 bits everywhere by
            default.
        data: Calibration inputs of one call each (pairs with `loss_fn`), for the algorithms "skm" and
            "gptq" and for the correction of batch norms and biases.
        loss_fn: `loss_fn(output, target)`; None needs no labels.
        options: `correct_statistics`, `tune_steps`, `on_unmatched`, `fold_batch_norm`, `seed` and
            `progress`, as for `graphopt.compress`.
    """
    whole = joint_config(config)
    if whole.quantization is not None:
        raise InputError("pipelines.palettize takes no quantization; use pipelines.joint")
    return Pipeline("palettize", joint_passes(whole, _listed(data), loss_fn, **options))


def quantize(
    config: QuantizerConfig | Mapping[str, Any] | str | Path | None = None,
    data: Sequence[Any] | None = None,
    *,
    backend: ExportBackend | str | None = None,
    on_unmatched: Literal["error", "warn"] = "error",
    on_unobserved: Literal["error", "skip"] = "error",
    progress: bool | None = None,
) -> Pipeline:
    """Weights and activations are quantized.

    Args:
        config: What becomes of what, or a mapping or YAML file of it; int8 everywhere by default.
        data: Calibration inputs of one call each, needed for the ranges of activations.
        backend: Target whose fusions decide where activations are rounded.
        on_unmatched: Whether a config key that matches nothing is an error or a warning.
        on_unobserved: "skip" leaves activations without a usable range in float.
        progress: Show bars; None shows them on a terminal.
    """
    whole = joint_config(QuantizerConfig() if config is None else config)
    if whole.palettization is not None:
        raise InputError("pipelines.quantize takes no palettization; use pipelines.joint")
    passes = joint_passes(
        whole, _listed(data), backend=backend, on_unmatched=on_unmatched,
        on_unobserved=on_unobserved, progress=progress,
    )  # fmt: skip
    return Pipeline("quantize", passes)


def joint(
    config: AnyConfig | Mapping[str, Any] | str | Path | None = None,
    data: Sequence[Any] | None = None,
    loss_fn: LossFn | None = None,
    **options: Any,
) -> Pipeline:
    """Palettized weights and quantized activations, in one pipeline: what `graphopt.compress` runs.

    Args:
        config: A `JointConfig`, one of its parts, or a mapping or YAML file of either; 4-bit tables
            and int8 activations by default.
        data: Calibration inputs of one call each; pairs (inputs, target) with `loss_fn`.
        loss_fn: `loss_fn(output, target)`; None needs no labels.
        options: As for `graphopt.compress`: `backend`, `correct_statistics`, `tune_steps`, `seed`,
            `progress`; and `on_unmatched`, `on_unobserved`, `fold_batch_norm`.
    """
    both = JointConfig(palettization=KMeansPalettizerConfig(), quantization=QuantizerConfig())
    whole = both if config is None else joint_config(config)
    return Pipeline("joint", joint_passes(whole, _listed(data), loss_fn, **options))


def rdo(
    data: Sequence[Any],
    config: RDOConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    progress: bool | None = None,
) -> Pipeline:
    """Rate-distortion-optimised quantization (`graphopt.rdo`) as a pipeline.

    Args:
        data: Unlabelled calibration inputs of one call each.
        config: An `RDOConfig`, a mapping of its fields, or a YAML file.
        progress: Show bars; None shows them on a terminal.
    """
    optimize = OptimizeRateDistortion(list(data), config, progress)
    return Pipeline("rdo", (RaiseToVocabulary(), optimize, RemoveUnused()))


def _listed(data: Sequence[Any] | None) -> list[Any] | None:
    return None if data is None else list(data)
