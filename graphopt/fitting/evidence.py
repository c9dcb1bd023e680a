"""What algorithms that find the stored forms of weights are given, and what they have found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from graphopt.numerics.affine import QParams
from graphopt.run.activation_store import ActivationStore
from graphopt.run.batches import Batch
from graphopt.schemes.base import StoredWeight
from graphopt.schemes.palettize import PalettizedWeight
from graphopt.schemes.quantize import QuantizedWeight

__all__ = ["Evidence", "Fits", "Integers", "Palettes", "Resources", "StoredT"]

StoredT = TypeVar("StoredT", bound=StoredWeight)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Where fits run; what they find does not depend on it, but for `device` in the last digits.

    Attributes:
        executor: Where layers are fitted that need nothing of each other, as for `run_tasks`; None fits
            one after the other.
        device: Torch device of the heavy arithmetic of layers, such as "cuda"; "cpu" takes torch's
            operations there too. None takes compiled code.
        activation_memory: Bytes that the layers' inputs and outputs may take in memory; those beyond lie
            in files. None keeps all in memory.
        work_dir: Folder for these files, and for the layers that are finished, from which an interrupted
            fit goes on. None keeps nothing but those files, in the system's folder for such.

    Examples:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> from graphopt.passes import AnnotateQuantization, FitIntegers, Resources
        >>> from graphopt.quantization import QuantizerConfig
        >>> gm = program.graph_module
        >>> _ = AnnotateQuantization(QuantizerConfig.presets.w4())(gm)
        >>> with ThreadPoolExecutor(2) as pool:
        ...     fit = FitIntegers(batches, resources=Resources(executor=pool))
        ...     _ = fit(gm)
    """

    executor: Any = None
    device: str | None = None
    activation_memory: int | None = None
    work_dir: str | Path | None = None

    def store(self) -> ActivationStore:
        """What holds the values of a fit's runs."""
        folder = None if self.work_dir is None else Path(self.work_dir)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return ActivationStore(self.activation_memory, folder)


@dataclass(frozen=True)
class Evidence:
    """What a calibration has seen.

    Attributes:
        batches: Inputs of one call each, where an algorithm asked for them.
        sensitivities: Name of a weight → mean squared gradient of each element.
        saliency: Name of an op's node → [batch, positions] per batch.
        spread: Name of an embedding's node → second moment of its output's gradient, [rows, rows].
        correct_bias: Whether biases may take up the mean error of their layers.
        seed: Seed of whatever is drawn.
        progress: Show bars; None shows them on a terminal.
        scales: Sharing group of activations → scale and offset by which they are rounded.
        resources: Where fits run.
    """

    batches: Sequence[Batch] = ()
    sensitivities: Mapping[str, Tensor] = field(default_factory=dict)
    saliency: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    spread: Mapping[str, Tensor] = field(default_factory=dict)
    correct_bias: bool = True
    seed: int = 0
    progress: bool | None = None
    scales: Mapping[str, QParams] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)


@dataclass(frozen=True)
class Fits(Generic[StoredT]):
    """What was found so far.

    Attributes:
        weights: Name of the weight → its stored form.
        biases: Name of the bias → its corrected value.
        remarks: What people should know.
    """

    weights: dict[str, StoredT] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


Palettes = Fits[PalettizedWeight]
Integers = Fits[QuantizedWeight]
