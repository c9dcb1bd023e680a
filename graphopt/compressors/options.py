"""CompressOptions: how a flow runs, in one object that every way in shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from torch import Tensor

from graphopt.backends.registry import ExportBackend
from graphopt.fitting.evidence import Resources
from graphopt.fitting.sensitivity import LossFn
from graphopt.numerics.device import device_of
from graphopt.specs.artifact import read_bytes
from graphopt.specs.options import Options

__all__ = ["CalibrationKeywords", "CompressKeywords", "CompressOptions", "PrepareKeywords"]


@dataclass(frozen=True, kw_only=True)
class CompressOptions(Options):
    """How a flow runs; what becomes of which tensor is the config's.

    Attributes:
        backend: Target whose fusions decide where activations are rounded, and whose tables decide
            the form of weights with a `max_table_share`; None is no particular.
        lowering: Options of the target's `lower` that change what it holds, such as Core ML's
            `minimum_deployment_target`; those of a config's `artifact` count before these.
        correct_statistics: Estimate batch norms again and correct biases after palettization and
            pruning, where there are data.
        tune_steps: Steps of tuning tables, ranges, norms and biases (`graphopt.tune`); 0 leaves it
            out. Of four calls of data or more one in eight is then held out.
        on_unmatched: Whether a config key that matches nothing is an error or a warning.
        on_unobserved: "skip" leaves activations without a usable range in float.
        fold_batch_norm: Fold batch norms before weights are palettized or pruned; None does where
            activations are quantized too.
        seed: Seed of everything that is drawn.
        progress: Show bars; None shows them on a terminal.
        executor: Where weights are compressed that need nothing of each other, such as those that read
            the same inputs where layers are fitted to data: any `concurrent.futures.Executor`, or a
            Dask client or cluster (`graphopt.Workers` says which folder its workers share); None takes
            the cores that torch may use. Results do not depend on it.
        mmap_dir: Folder that the codes of palettes move to as soon as they are found without data; the
            program reads them from there as long as it lives. None keeps them in memory.
        device: Torch device on which weights are clustered, layers are fitted and programs are tuned,
            such as "cuda" or "mps"; other passes of the model stay where its tensors are. Squared
            errors are those of the CPU's compiled code within 2 %, tuned ones within 5 %; "cpu" takes
            torch's operations there, to compare. None is the compiled code.
        activation_memory: What inputs and outputs of layers may take in memory while layers are fitted
            to data, in bytes or as a text such as "2GB"; those beyond lie in files. None keeps all in
            memory. Results do not depend on it.
        work_dir: Folder for these files, and for each layer that error feedback has finished: a fit
            that was killed goes on there, with the same bytes in the end. Delete it when done.
    """

    backend: ExportBackend | str | None = None
    lowering: Mapping[str, Any] | None = None
    correct_statistics: bool = True
    tune_steps: int = 0
    on_unmatched: Literal["error", "warn"] = "error"
    on_unobserved: Literal["error", "skip"] = "error"
    fold_batch_norm: bool | None = None
    seed: int = 0
    progress: bool | None = None
    executor: Any = None
    mmap_dir: str | Path | None = None
    device: str | None = None
    activation_memory: float | str | None = None
    work_dir: str | Path | None = None

    def __post_init__(self) -> None:
        if self.activation_memory is not None:
            read_bytes(self.activation_memory)  # refuse what is no size before any work
        device_of(self.device)

    @property
    def resources(self) -> Resources:
        """Where weights are clustered and fitted."""
        limit = None if self.activation_memory is None else read_bytes(self.activation_memory)
        return Resources(
            executor=self.executor,
            device=self.device,
            activation_memory=limit,
            work_dir=self.work_dir,
        )


class CompressKeywords(TypedDict, total=False):
    """The options of `CompressOptions` as keywords of a call."""

    backend: ExportBackend | str | None
    lowering: Mapping[str, Any] | None
    correct_statistics: bool
    tune_steps: int
    on_unmatched: Literal["error", "warn"]
    on_unobserved: Literal["error", "skip"]
    fold_batch_norm: bool | None
    seed: int
    progress: bool | None
    executor: Any
    mmap_dir: str | Path | None
    device: str | None
    activation_memory: float | str | None
    work_dir: str | Path | None


class CalibrationKeywords(TypedDict, total=False):
    """Options of `KMeansPalettizer.calibration_mode` as keywords of a call."""

    loss_fn: LossFn | None
    sensitivity_path: str | Path | None
    label_free: Literal["mse", "kl"]
    per_sample: bool
    correct_bias: bool
    mmap_dir: str | Path | None


class PrepareKeywords(TypedDict, total=False):
    """Options of `KMeansPalettizer.prepare` as keywords of a call."""

    dynamic_shapes: Any
    fold_batch_norm: bool
    sensitivity_path: str | Path | None
    on_unmatched: Literal["error", "warn"]
    num_workers: int
    executor: Any
    device: str | None
    progress: bool | None
    seed: int
    state_dict: Mapping[str, Tensor] | None
    cache_dense: bool
