"""The calibration of palettes: gradients and inputs are collected while the user's data runs."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphopt.analysis.weights import find_weights
from graphopt.errors import CalibrationError, InputError
from graphopt.fitting.output_fit import fit_to_outputs
from graphopt.fitting.sensitivity import GradientCollector, LossFn, label_free_loss
from graphopt.ir.annotations import palette_annotation
from graphopt.ir.captured_module import CapturedModule, holder_of, set_tensor
from graphopt.ir.program import Program, share_graph
from graphopt.passes import InsertTaps, cluster_annotated
from graphopt.passes.pass_manager import run_passes
from graphopt.progress import track
from graphopt.run.batches import Batch
from graphopt.schemes.palettize import PalettizedWeight

__all__ = ["Calibrator", "algorithms_of", "set_biases", "shapes_to_weigh", "without_data"]

_log = logging.getLogger(__name__)
_TAPS = "_taps"


def algorithms_of(annotated: Program) -> dict[str, str]:
    """Name of each weight to be palettized → the algorithm that a calibration runs for it."""
    found: dict[str, str] = {}
    for weight in find_weights(annotated.graph_module):
        annotation = palette_annotation(weight.nodes[0])
        if annotation is not None:
            algorithm = annotation.spec.algorithm
            found[weight.name] = "skm" if algorithm == "auto" else algorithm
    return found


def without_data(gm: fx.GraphModule, weighed: Collection[str] = ()) -> list[str]:
    """Weights whose algorithms need data, each with the algorithm and the config path that asks for it.

    Args:
        gm: A graph that `AnnotatePalettization` has seen.
        weighed: Weights with known sensitivities, which are all that "skm" needs.
    """
    waiting = []
    for weight in find_weights(gm):
        annotation = palette_annotation(weight.nodes[0])
        if annotation is None:
            continue
        algorithm = annotation.spec.algorithm
        if algorithm == "gptq" or (algorithm == "skm" and weight.name not in weighed):
            waiting.append(f"{weight.name}: {algorithm!r} ({annotation.path})")
    return waiting


def set_biases(gm: CapturedModule, biases: Mapping[str, Tensor]) -> None:
    """Give biases the values by which a fit has corrected them; tensors are replaced."""
    for path, value in biases.items():
        holder, name = holder_of(gm, path)
        set_tensor(holder, name, value)


def shapes_to_weigh(annotated: Program) -> dict[str, torch.Size]:
    """Name → shape of the weights whose errors sensitivities weigh."""
    algorithms = algorithms_of(annotated)
    return {
        weight.name: weight.tensor.shape
        for weight in find_weights(annotated.graph_module)
        if algorithms.get(weight.name, "kmeans") != "kmeans"
    }


class Calibrator:
    """Collects while the prepared module runs inside `calibration_mode`.

    Args:
        annotated: The program with its original weights.
        loss_fn: `loss_fn(output, target)`, the mean over a batch; None takes the label-free loss.
        label_free: "mse" or "kl", see `graphopt.sensitivity.label_free_loss`.
        per_sample: Square the gradient of every sample; False takes `E[δ²]·E[x²]`, cheaper and with
            less variance from few samples, but blind to which inputs and gradients come together.
        squares: Collect sensitivities even where no algorithm uses them, to save them.
        folder: Folder for the sums, which are mapped into memory; None keeps them there.
        seed: Seed of the label-free loss.
    """

    def __init__(
        self,
        annotated: Program,
        *,
        loss_fn: LossFn | None = None,
        label_free: str = "mse",
        per_sample: bool = True,
        squares: bool = False,
        folder: Path | None = None,
        seed: int = 0,
    ) -> None:
        self.annotated = annotated
        self.algorithms = algorithms_of(annotated)
        self.batches: list[Batch] = []
        self.steps = 0
        self._loss_fn = loss_fn
        self._label_free = label_free
        self._generator = torch.Generator().manual_seed(seed)
        self._layerwise = "gptq" in self.algorithms.values()
        self._watched = [name for name, each in self.algorithms.items() if each != "kmeans"]
        self.collector = GradientCollector(
            per_sample=per_sample,
            squares=squares or "skm" in self.algorithms.values(),
            positions=self._layerwise,
            folder=folder,
        )

    def step(self, output: Any, target: Any = None) -> Tensor:
        """Take in one batch: runs the loss and its backward pass.

        Args:
            output: What the prepared module returned for the batch.
            target: Second argument of the loss function; not used by the label-free loss.

        Returns:
            The loss, detached.

        Raises:
            InputError: The loss depends on no watched weight.
        """
        if not self._watched:
            return torch.zeros(())
        batch = _batch_size(output)
        if self._loss_fn is None:
            loss, scale = label_free_loss(output, self._generator, self._label_free), 1.0
        else:
            loss = self._loss_fn(output, target)
            # gradients of a mean over the batch are those of one sample over the batch's size
            loss, scale = (loss.sum(), 1.0) if loss.ndim else (loss, float(batch))
        if not loss.requires_grad:
            raise InputError(
                "the loss has no gradient: call the prepared module inside the context with"
                " gradients enabled, and compute the loss from its output"
            )
        self.collector.scale = scale
        loss.backward()
        self.collector.samples += batch
        self.steps += 1
        return loss.detach()

    @contextmanager
    def watching(self, prepared: CapturedModule) -> Iterator[None]:
        """Let a prepared module run with its original weights, watched."""
        tapped = share_graph(self.annotated.graph_module)
        run_passes(tapped, [InsertTaps(self.collector, tuple(self._watched))])
        before, graph = _state(prepared), prepared.graph
        hook = prepared.register_forward_pre_hook(self._remember, with_kwargs=True)
        try:
            for path in before:
                holder, name = holder_of(self.annotated.graph_module, path)
                _tensor(prepared, path).data = getattr(holder, name).detach()
            for parameter in prepared.parameters():
                parameter.requires_grad_(False)
            if hasattr(tapped, _TAPS):
                prepared.add_module(_TAPS, getattr(tapped, _TAPS))
            prepared.graph = tapped.graph
            yield
        finally:
            hook.remove()
            if hasattr(prepared, _TAPS):
                delattr(prepared, _TAPS)
            prepared.graph = graph
            for path, (value, trained) in before.items():
                restored = _tensor(prepared, path)
                restored.data = value
                restored.requires_grad_(trained)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        if self._layerwise or self.steps == 0:
            self.batches.append(pytree.tree_map(_detached, (args, kwargs)))
        else:
            self.batches.clear()

    def collect(self, prepared: CapturedModule, progress: bool | None) -> None:
        """Run the label-free loss on the inputs that were seen, if no step was made.

        Raises:
            CalibrationError: No data ran through the module.
        """
        if self.steps or not self._watched:
            return
        if not self.batches:
            raise CalibrationError(
                "no data ran inside calibration_mode(); call the prepared module there"
            )
        batches, kept = list(self.batches), self._layerwise
        with self.watching(prepared), torch.enable_grad():
            for args, kwargs in track(batches, "gradients", len(batches), enabled=progress):
                self.step(prepared(*args, **kwargs))
        self.batches = batches if kept else []

    def palettes(
        self, seed: int, progress: bool | None, *, correct_bias: bool
    ) -> tuple[dict[str, PalettizedWeight], dict[str, Tensor], list[str]]:
        """Tables and codes after the data: palettes, corrected biases, remarks."""
        names = {each: [n for n, a in self.algorithms.items() if a == each] for each in _ALL}
        sums = self.collector.finish()
        remarks = [
            f"{name}: no gradient reached it; clustered without weights"
            for name in names["skm"]
            if name not in sums or not bool(sums[name].any())
        ]
        for remark in remarks:
            _log.warning("%s", remark)
        found = cluster_annotated(
            self.annotated.graph_module,
            progress=progress,
            seed=seed,
            importance=sums,
            names=[*names["kmeans"], *names["skm"]],
        )
        biases: dict[str, Tensor] = {}
        if names["gptq"]:
            count = len(self.batches)
            saliency = {k: v for k, v in self.collector.saliency.items() if len(v) == count}
            fit = fit_to_outputs(
                self.annotated,
                self.batches,
                found,
                saliency,
                self.collector.spread,
                names=names["gptq"],
                correct_bias=correct_bias,
                seed=seed,
                progress=progress,
            )
            found |= fit.palettes
            biases = fit.biases
            remarks += [
                f"{name}: {why}; fitted without feedback" for name, why in fit.fallbacks.items()
            ]
        return found, biases, remarks


_ALL = ("kmeans", "skm", "gptq")


def _state(module: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    return {
        name: (value.data, value.requires_grad)
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }


def _tensor(module: nn.Module, path: str) -> Tensor:
    holder, name = holder_of(module, path)
    found = getattr(holder, name)
    assert isinstance(found, Tensor)
    return found


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _batch_size(output: Any) -> int:
    for each in pytree.tree_leaves(output):
        if isinstance(each, Tensor) and each.ndim:
            return each.shape[0]
    return 1
